"""Directories that appear under their name when they are whole, and not at all otherwise."""

from __future__ import annotations

import contextlib
import os
import re
import secrets
import shutil
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import jax

from mtd_jax.errors import InputError


@contextlib.contextmanager
def atomic_directory(out: Path, *, force: bool = False) -> Iterator[Path]:
    """Yields a new directory beside `out`, renamed to `out` when the block ends without error.

    What a killed process left of an earlier attempt is removed first.

    Args:
      force: replace a checkpoint that is already there.

    Raises:
      InputError: `out` is there and must not be replaced, or writing fails (a full disk, rights).
    """
    out = out.absolute()
    work = out.parent / f".{out.name}.part-{os.getpid()}-{secrets.token_hex(4)}"
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        _remove_stale(out)
        check_free(out, force=force)
        work.mkdir()
        yield work
        with undisturbed():
            put_in_place(work, out)
    except OSError as error:
        raise _cannot_write(out, error) from error
    finally:
        with undisturbed():
            _remove(work)


@contextlib.contextmanager
def shared_directory(out: Path, *, force: bool = False) -> Iterator[Path]:
    """`atomic_directory` for any number of processes, all of which write into it.

    The disk must be one that all of them see. The first process makes the directory and puts it in
    place; of several, an older one at `out` is replaced.
    """
    if jax.process_count() == 1:
        with atomic_directory(out, force=force) as work:
            yield work
        return
    from jax.experimental import multihost_utils

    first = jax.process_index() == 0
    work = out.absolute().parent / f".{out.name}.part-together"
    if first:
        shutil.rmtree(work, ignore_errors=True)
        work.mkdir(parents=True)
    multihost_utils.sync_global_devices("mtd-jax: a directory to write to")
    yield work
    multihost_utils.sync_global_devices("mtd-jax: everything is written")
    if first:
        put_in_place(work, out.absolute())
    multihost_utils.sync_global_devices("mtd-jax: everything is in its place")


@contextlib.contextmanager
def undisturbed() -> Iterator[None]:
    """Ctrl-C and SIGTERM wait until the block is done.

    For what cannot be stopped or must not be: threads that write would put back files that are
    being removed. Of several processes, JAX watches the signals.
    """
    if threading.current_thread() is not threading.main_thread() or jax.process_count() > 1:
        yield
        return
    came: list[int] = []
    former = {
        name: signal.signal(name, lambda number, frame: came.append(number))
        for name in (signal.SIGINT, signal.SIGTERM)
    }
    try:
        yield
    finally:
        for name, handler in former.items():
            signal.signal(name, handler)
        for number in came:
            signal.raise_signal(number)


def write_file(path: Path, text: str) -> None:
    """Writes beside the file and renames: a killed run leaves the old one.

    Raises:
      InputError: writing fails.
    """
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        partial.write_text(text, encoding="utf-8")
        partial.replace(path)
    except OSError as error:
        raise InputError(f"cannot write {path}: {error.strerror}") from None


def check_free(out: Path, *, force: bool = False) -> None:
    """Refuses an `out` that holds something; `force` allows to replace a checkpoint, nothing else.

    Raises:
      InputError: says what is in the way.
    """
    if not out.exists() and not out.is_symlink():
        return
    if not out.is_dir() or out.is_symlink():
        raise InputError(f"{out} is there already and is no directory")
    if not any(out.iterdir()):
        return
    if not force:
        raise InputError(f"{out} is there already (--force replaces it)")
    if not any((out / name).is_file() for name in ("config.json", "method.json")):
        raise InputError(f"{out} holds no checkpoint, so --force does not replace it")


def check_space(directory: Path, size: int) -> None:
    """Refuses to begin what does not fit on the disk.

    Raises:
      InputError: fewer than `size` bytes are free where `directory` lies.
    """
    free = shutil.disk_usage(directory).free
    if free < size:
        raise InputError(
            f"cannot write {directory.parent}: {size / 1e6:,.0f} MB are needed there "
            f"and {free / 1e6:,.0f} MB are free"
        )


def put_in_place(work: Path, out: Path) -> None:
    """Renames a whole directory to its name, over an older one."""
    if not out.exists():
        work.rename(out)
        return
    old = work.with_name(f"{work.name}-old")
    out.rename(old)
    work.rename(out)
    shutil.rmtree(old, ignore_errors=True)


def _remove(work: Path) -> None:
    """Removes it until it stays away for half a second, and for ten seconds at most.

    After one write failed, the other threads of Orbax go on, and make their directories again.
    """
    if not work.exists():
        return
    away = 0
    for _ in range(200):
        shutil.rmtree(work, ignore_errors=True)
        time.sleep(0.05)
        away = 0 if work.exists() else away + 1
        if away == 10:
            return


def _remove_stale(out: Path) -> None:
    pattern = re.compile(re.escape(f".{out.name}.part-") + r"(\d+)-[0-9a-f]{8}(-old)?")
    for path in out.parent.iterdir():
        match = pattern.fullmatch(path.name)
        if match is None or _is_alive(int(match[1])):
            continue
        if match[2] and not out.exists():
            path.rename(out)  # killed between the two renames: the former checkpoint is whole
        else:
            shutil.rmtree(path, ignore_errors=True)


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except OSError:
        return True
    return True


def _cannot_write(out: Path, error: OSError) -> InputError:
    return InputError(f"cannot write {out}: {error.strerror or error}")
