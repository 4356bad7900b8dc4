"""Compiles the package's C++ for the machine that it runs on, and loads it.

The source is compiled where it is first needed, with whatever vector instructions the processor
has, against the headers of the installed jaxlib (jax.ffi), and kept in the cache directory.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
import warnings
from importlib import metadata
from pathlib import Path

import jax

from mtd_jax.directories import cache_directory

SOURCE = Path(__file__).with_name("few_rows.cc")
SWITCH = "MTD_KERNELS"
"""In the environment: 0 leaves everything to XLA."""

_FLAGS = ("-std=c++17", "-O3", "-fPIC", "-shared", "-w")
_COMPILERS = ("c++", "g++", "clang++")
_PATIENCE = 120.0


@functools.cache
def load() -> ctypes.CDLL | None:
    """The library; None where it is switched off or cannot be had.

    That there is no compiler is said by `about` alone. That one failed is a warning.
    """
    compiler = _compiler()
    if os.environ.get(SWITCH) == "0" or compiler is None:
        return None
    path = cache_directory() / "kernels" / f"few-rows-{_key(compiler)}.so"
    try:
        if not path.exists():
            _build(compiler, path)
        return ctypes.CDLL(str(path))
    except (OSError, subprocess.SubprocessError) as error:
        said = getattr(error, "stderr", None) or str(error)
        last = said.strip().splitlines()[-1] if said.strip() else type(error).__name__
        warnings.warn(
            f"{SOURCE.name} was not compiled ({last}); decoding on this CPU is slower without",
            stacklevel=2,
        )
        return None


def about() -> str:
    """What products of few rows run on here, for records of measurements."""
    if jax.default_backend() != "cpu" or load() is None:
        return "xla"
    return f"few_rows ({Path(_compiler() or '').name})"


def _compiler() -> str | None:
    chosen = os.environ.get("CXX")
    return next(filter(None, map(shutil.which, (chosen,) if chosen else _COMPILERS)), None)


def _key(compiler: str) -> str:
    """Changes with whatever the result depends on."""
    seen = Path(compiler).resolve().stat()
    parts = [
        SOURCE.read_bytes(),
        f"{compiler} {seen.st_size} {seen.st_mtime_ns} {_FLAGS}".encode(),
        metadata.version("jaxlib").encode(),
        _processor(),
    ]
    return hashlib.sha256(b"\0".join(parts)).hexdigest()[:16]


def _processor() -> bytes:
    """Its instructions: a cache directory may be shared by different machines."""
    try:
        lines = Path("/proc/cpuinfo").read_bytes().splitlines()
    except OSError:
        return platform.processor().encode()
    return b"".join(sorted({line for line in lines if line.startswith((b"flags", b"Features"))}))


def _build(compiler: str, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    native = "-march=native" if platform.machine() in ("x86_64", "AMD64") else "-mcpu=native"
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=".part-") as work:
        made = Path(work) / path.name
        command = [compiler, *_FLAGS, native, "-I", jax.ffi.include_dir(), str(SOURCE)]
        subprocess.run(
            [*command, "-o", str(made)],
            check=True,
            capture_output=True,
            text=True,
            timeout=_PATIENCE,
            stdin=subprocess.DEVNULL,
        )
        made.replace(path)
