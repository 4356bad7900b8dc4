"""Runs that are really killed, and runs of several real processes."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from mtd_jax.convert.conversions import to_huggingface
from mtd_jax.convert.native import read_info
from mtd_jax.training.checkpoint import Checkpoints
from mtd_jax.training.config import CheckpointConfig
from tests.support import command_line
from tests.support.training import (
    assert_same_bits,
    log_of,
    losses,
    make_run,
    write_config,
    write_model,
    write_place,
    write_texts,
)

pytestmark = pytest.mark.slow

STEPS = 24
# Large enough that a save takes a moment in which it can be interrupted.
SIZES = {"hidden_size": 192, "intermediate_size": 768, "num_layers": 6, "head_dim": 24}
CHANGES: dict[str, Any] = {
    "optimizer__steps": STEPS,
    "checkpoint__every": 4,
    "evaluate__every": 12,
    "log__every": 1,
    "data__batch_size": 4,
}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("killed")
    write_model(directory, **SIZES)
    write_texts(directory)
    return directory


def _start(
    place: Path, out: Path, *flags: str, environment: dict[str, str] | None = None, **changes: Any
) -> subprocess.Popen[str]:
    config = write_config(place, f"{out.name}.toml", **{**CHANGES, "out": str(out), **changes})
    words = [sys.executable, "-m", "mtd_jax.cli", "train", str(config), *flags]
    here = {"MTD_CACHE_DIR": str(place / "cache"), "MTD_CONNECT_TIMEOUT": "60"}
    return subprocess.Popen(
        words,
        env=command_line.environment() | here | (environment or {}),
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )


def _ended(process: subprocess.Popen[str], code: int = 0) -> str:
    out, err = process.communicate(timeout=400)
    assert process.returncode == code, err[-3000:]
    return out + err


def _wait(process: subprocess.Popen[str], ready: Callable[[], bool]) -> None:
    """Until something is so; a run that ends before has missed its moment, which is a failure."""
    until = time.monotonic() + 300
    while not ready():
        assert process.poll() is None, process.communicate()[1][-3000:]
        assert time.monotonic() < until
        time.sleep(0.001)


def _final(place: Path, out: Path, steps: int = STEPS) -> tuple[Any, dict[str, Any]]:
    """State and data position of a run's last checkpoint, restored here."""
    run = make_run(place, **{**CHANGES, "out": str(out)})
    trainable, _ = run.trainer.objective.split(run.load().params)
    checkpoints = Checkpoints(out / "checkpoints", CheckpointConfig())
    assert checkpoints.latest == steps
    state, data = checkpoints.restore(steps, run.trainer.layout(trainable, run.mesh))
    checkpoints.close()
    return jax.device_get(state), dict(data)


@pytest.fixture(scope="module")
def whole(place: Path) -> tuple[Any, list[dict[str, float]]]:
    """The uninterrupted run."""
    out = place / "whole"
    _ended(_start(place, out))
    return _final(place, out), log_of(out)


def _checkpoints(out: Path) -> list[str]:
    try:
        return os.listdir(out / "checkpoints")
    except FileNotFoundError:
        return []


def _half_written(out: Path) -> bool:
    """Orbax writes a checkpoint under another name first."""
    return any("tmp" in name for name in _checkpoints(out))


def _whole(out: Path) -> list[int]:
    return [int(name) for name in _checkpoints(out) if name.isdecimal()]


def _halt_in_a_save(process: subprocess.Popen[str], out: Path) -> None:
    """Halts the process where a checkpoint is half written and an older one is there."""
    while True:
        _wait(process, lambda: bool(_whole(out)) and _half_written(out))
        process.send_signal(signal.SIGSTOP)
        time.sleep(0.1)
        if _whole(out) and _half_written(out):
            return
        process.send_signal(signal.SIGCONT)  # too late: the next one


def _behind(out: Path, step: int) -> bool:
    """The log, which is written at once, has come so far: by now the next step is running."""
    return any(line["step"] >= step for line in log_of(out))


@pytest.mark.parametrize("moment", ["step", "save"])
@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGKILL], ids=lambda s: s.name)
def test_killed_and_started_again_is_bit_identical(
    place: Path, whole: tuple[Any, list[dict[str, float]]], how: signal.Signals, moment: str
) -> None:
    out = place / f"{how.name}-{moment}"
    process = _start(place, out)
    if moment == "step":
        _wait(process, lambda: _behind(out, 6) and bool(_whole(out)))
    else:
        _halt_in_a_save(process, out)
    process.send_signal(how)
    process.send_signal(signal.SIGCONT)
    said = _ended(process, 0 if how == signal.SIGTERM else -signal.SIGKILL)
    before = log_of(out)
    assert before[-1]["step"] < STEPS
    if how == signal.SIGTERM:
        assert "the same command goes on from there" in said
    newest = max(_whole(out))
    if how == signal.SIGKILL:
        # What was half written when it was killed still is, and does not count.
        assert _half_written(out) or moment == "step"
        assert newest % 4 == 0
    assert f"goes on behind step {newest} of {STEPS}" in _ended(_start(place, out))
    state, data = _final(place, out)
    assert_same_bits(state, whole[0][0])
    assert data == whole[0][1]
    assert log_of(out) == whole[1]
    assert not _half_written(out)
    assert (out / "model" / "config.json").is_file()


def _free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


def _two(
    place: Path, outs: tuple[Path, Path], *, devices: int = 1, changes: tuple[Any, Any] = ({}, {})
) -> list[subprocess.Popen[str]]:
    """Two processes of so many devices each, with the config's changes of each."""
    port = _free_port()
    return [
        _start(
            place,
            out,
            *("--coordinator", f"127.0.0.1:{port}"),
            *("--process-count", "2", "--process-index", str(index)),
            environment=command_line.environment(devices=devices)
            | {"MTD_CACHE_DIR": str(place / f"cache-{out.name}-{index}")},
            **{"mesh__data": 0, **own},
        )
        for index, (out, own) in enumerate(zip(outs, changes, strict=True))
    ]


def _together(
    place: Path, out: Path, devices: int = 1, **changes: Any
) -> list[subprocess.Popen[str]]:
    return _two(place, (out, out), devices=devices, changes=(changes, changes))


def _few(place: Path) -> dict[str, Any]:
    return {
        "optimizer__steps": 8,
        "evaluate__every": 4,
        "evaluate__prompts": str(place / "prompts.jsonl"),
        "evaluate__new_tokens": 8,
    }


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Nothing is killed here: the sizes may be small."""
    return write_place(tmp_path_factory.mktemp("together"))


@pytest.fixture(scope="module")
def single(small: Path) -> list[dict[str, float]]:
    """The log of a run on one device."""
    _ended(_start(small, small / "single", **_few(small)))
    return log_of(small / "single")


@pytest.mark.parametrize(
    ("devices", "mesh"),
    [
        pytest.param(1, {}, id="data"),
        pytest.param(1, {"mesh__data": 1, "mesh__fsdp": 2}, id="fsdp"),
        # Each process is a slice: weights are shared out within it, gradients summed across.
        pytest.param(2, {"mesh__data": 1, "mesh__fsdp": 2, "mesh__slices": 2}, id="slices"),
    ],
)
def test_two_processes_train_as_one(
    small: Path, single: list[dict[str, float]], devices: int, mesh: dict[str, Any]
) -> None:
    """To the bit as one process with two devices, and to 1e-5 relative as one device.

    A sum over several devices is added in another order than on one (float32), and one over slices
    of several processes in another than over slices of one.
    """
    few = _few(small)
    outs = {name: small / f"{name}-{len(mesh)}" for name in ("two", "one")}
    for process in _together(small, outs["two"], devices, **few, **mesh):
        _ended(process)
    here = command_line.environment(devices=2 * devices)
    _ended(_start(small, outs["one"], environment=here, **few, **{"mesh__data": 0, **mesh}))
    logs = {name: log_of(out) for name, out in outs.items()}
    assert any("held_out_decoded_as_before" in line for line in logs["two"])
    for other in (logs["one"], single):
        np.testing.assert_allclose(losses(logs["two"]), losses(other), rtol=1e-5)
    if devices > 1:
        return
    assert logs["two"] == logs["one"]
    # Restored by one process on one device.
    finals = {name: _final(small, outs[name], 8) for name in ("two", "one")}
    assert_same_bits(finals["two"][0], finals["one"][0])
    assert finals["two"][1] == finals["one"][1]
    models = [read_info(outs[name] / "model").fingerprint for name in ("two", "one")]
    assert models[0] == models[1]


def test_two_processes_stop_together(place: Path) -> None:
    """SIGTERM to one of them ends both behind the same step, and one process goes on alone."""
    out = place / "preempted"
    both = _together(place, out, optimizer__steps=400)
    _wait(both[0], lambda: _behind(out, 6))
    both[1].send_signal(signal.SIGTERM)
    for process in both:
        _ended(process)
    steps = {line["step"] for line in log_of(out)}
    assert max(steps) < 400
    checkpoints = Checkpoints(out / "checkpoints", CheckpointConfig())
    assert checkpoints.latest == max(steps)
    checkpoints.close()


@pytest.mark.parametrize("what", ["prompts", "weights"])
def test_what_one_process_refuses_all_refuse(small: Path, what: str) -> None:
    """In one line each, and at once: nobody waits for a process that has gone."""
    began, there = time.monotonic(), _few(small)
    if what == "prompts":
        missing = {"evaluate__prompts": str(small / "nowhere.jsonl")}
    else:  # found when values are read
        there["model"] = str(small / "readable")
        missing = {"model": str(small / "nowhere")}
        for name in ("readable", "nowhere"):
            to_huggingface(small / "model", small / name)
        file = small / "nowhere" / "model.safetensors"
        tensors = load_file(file)
        tensors["model.norm.weight"][0] = np.nan
        save_file(tensors, file, metadata={"format": "pt"})
    outs = (small / f"{what}-0", small / f"{what}-1")
    both = _two(small, outs, changes=(there, {**there, **missing}))
    said = [_ended(process, 2) for process in both]
    words = "nowhere.jsonl" if what == "prompts" else "NaN"
    assert all(words in text and "Traceback" not in text for text in said)
    assert "process 1 of this run refused" in said[0]
    assert time.monotonic() - began < 90


def test_a_process_may_be_slow_to_prepare(small: Path) -> None:
    """By more than the 30 seconds that devices of CPUs wait for each other at first."""
    out = small / "slow"
    changes = {**_few(small), "data__cache": ""}  # each its own
    both = _two(small, (out, out), changes=(changes, changes))
    tokens = small / "cache-slow-1" / "tokens"
    _wait(both[1], lambda: tokens.is_dir() and any(tokens.iterdir()))
    both[1].send_signal(signal.SIGSTOP)
    time.sleep(35)
    both[1].send_signal(signal.SIGCONT)
    for process in both:
        _ended(process)


@pytest.mark.parametrize("index", [0, 1])
def test_processes_that_do_not_find_each_other(place: Path, index: int) -> None:
    """In one line: left to itself, JAX ends such a process with a stack trace."""
    port = _free_port()
    flags = ["--coordinator", f"127.0.0.1:{port}", "--process-count", "2"]
    flags += ["--process-index", str(index)]
    config = write_config(place, "alone.toml", **{**CHANGES, "out": str(place / "alone")})
    environment = command_line.environment() | {"MTD_CONNECT_TIMEOUT": "3"}
    done = subprocess.run(
        [sys.executable, "-m", "mtd_jax.cli", "train", str(config), *flags],
        env=environment,
        text=True,
        capture_output=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 2, done.stderr
    assert "did not find each other" in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1, done.stderr
