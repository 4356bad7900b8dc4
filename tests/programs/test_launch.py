"""What the files of train/launch/ come to, with everything but the shell replaced."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import textwrap
import time
from pathlib import Path

import pytest

from mtd_jax.training.config import read_config
from tests.support.command_line import ROOT

LAUNCH = ROOT / "train" / "launch"
PODS = "configs/pods/qwen3-4b-v5e-256.toml"
PLACES = {"MODEL": "models/my model", "DATA": "data/all.jsonl", "OUT": "runs/my out"}
# Keeps its words, waits for SIGTERM where it is told to, and writes the model of a finished run.
MTD = """\
#!/usr/bin/env python3
import json, os, signal, sys, time
from pathlib import Path
def stop(*_):
    Path("asked").touch()
    sys.exit(0)
signal.signal(signal.SIGTERM, stop)
Path("words").write_text(json.dumps(sys.argv[1:]))
if "STAYS" in os.environ:
    time.sleep(60)
model = Path(os.environ["OUT"], "model")
model.mkdir(parents=True)
(model / "config.json").touch()
"""
GCLOUD = """\
#!/usr/bin/env bash
for word in "$@"; do
  case $word in
    *'-m venv'*) ;;
    --command=*) exec bash -c "cd ~; ${word#--command=}" ;;
  esac
done
"""
SRUN = """\
#!/usr/bin/env bash
shift
exec "$@"
"""


@pytest.fixture
def home(tmp_path: Path) -> Path:
    """A home with programs that only look like those that the files call."""
    stubs = {"bin/gcloud": GCLOUD, "bin/srun": SRUN, "bin/mtd": MTD, "venv/bin/mtd": MTD}
    for name, text in stubs.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
        path.chmod(0o755)
    (tmp_path / "mtd-jax").mkdir()
    return tmp_path


def _environment(home: Path, **changes: str) -> dict[str, str]:
    found = {"HOME": str(home), "PATH": f"{home}/bin:{os.environ['PATH']}"}
    found |= {"NAME": "pod", "ZONE": "zone", "ROOT": str(home), "VENV": str(home / "venv")}
    found |= {"SLURM_SUBMIT_DIR": str(home), "SLURM_JOB_ID": "1", **PLACES, **changes}
    return {name: value for name, value in found.items() if value}


def _command(file: str) -> list[str]:
    if file == "gke_jobset.yaml":
        text = (LAUNCH / file).read_text(encoding="utf-8")
        found = re.search(r"- \|\n(.*?)\n *resources:", text, re.DOTALL)
        assert found is not None
        return ["sh", "-c", textwrap.dedent(found[1])]
    words = ["bash", str(LAUNCH / file)]
    return [*words, PODS] if file == "tpu_vm.sh" else words


def _started(file: str, home: Path, **changes: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        _command(file),
        cwd=home,
        env=_environment(home, **changes),
        text=True,
        capture_output=True,
        timeout=60,
        check=False,
    )


FILES = {
    "tpu_vm.sh": PODS,
    "gke_jobset.yaml": PODS,
    "slurm_gpu.sbatch": "train/launch/slurm_gpu.toml",
}


@pytest.mark.parametrize("file", FILES)
def test_the_command_that_it_comes_to(file: str, home: Path) -> None:
    done = _started(file, home)
    assert done.returncode == 0, done.stderr
    command, config, *sets = json.loads((home / "words").read_text(encoding="utf-8"))
    assert command == "train"
    assert Path(config).name in (Path(FILES[file]).name, "run.toml")
    assert set(sets[::2]) == {"--set"}
    read = read_config(ROOT / FILES[file], sets[1::2])
    assert (read.model, read.data.train) == (PLACES["MODEL"], (PLACES["DATA"],))
    if file != "slurm_gpu.sbatch":
        assert read.out == PLACES["OUT"]


@pytest.mark.parametrize("name", ["MODEL", "DATA"])
@pytest.mark.parametrize("file", FILES)
def test_what_is_missing_is_said_in_one_line(file: str, name: str, home: Path) -> None:
    done = _started(file, home, **{name: ""})
    assert done.returncode == 2
    assert len(done.stderr.splitlines()) == 1
    assert f"no {name}" in done.stderr
    assert not (home / "words").exists()


@pytest.mark.parametrize("file", FILES)
def test_shells_can_read_it(file: str, home: Path) -> None:
    shell, *rest = _command(file)
    if rest[0] == "-c":
        (home / "script").write_text(rest[1], encoding="utf-8")
        rest = [str(home / "script")]
    subprocess.run([shell, "-n", rest[0]], check=True)


def test_sigterm_to_a_pod_reaches_the_run(home: Path) -> None:
    """The run may save; that it was stopped is a failure for the JobSet, which starts it again."""
    process = subprocess.Popen(
        _command("gke_jobset.yaml"), cwd=home, env=_environment(home, STAYS="1")
    )
    until = time.monotonic() + 30
    while not (home / "words").exists():
        assert time.monotonic() < until
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=30) == 1
    assert (home / "asked").exists()
