"""Many `mtd` commands in one fresh process, without the type checks that tests switch on."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import pytest

_RUNNER = """
import contextlib, io, json, sys
from mtd_jax.cli.main import main
for argv in json.load(sys.stdin):
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            code = main(argv)
        except SystemExit as stop:
            code = stop.code
    print(json.dumps([code, out.getvalue(), err.getvalue()]), flush=True)
"""
ROOT = Path(__file__).parents[2]


class Outcome(NamedTuple):
    code: int
    out: str
    err: str


def environment(devices: int = 1) -> dict[str, str]:
    """So many devices, no network; programs are compiled as those of the tests are."""
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    count = "--xla_force_host_platform_device_count="
    kept = [flag for flag in os.environ["XLA_FLAGS"].split() if not flag.startswith(count)]
    flags = " ".join([*kept, f"{count}{devices}"])
    return {**os.environ, "XLA_FLAGS": flags, "PYTHONPATH": path.rstrip(os.pathsep)}


def one_line(capsys: pytest.CaptureFixture[str]) -> str:
    """What `main` said in this process: one line that names an error, and nothing else."""
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("mtd: error: ")
    assert captured.err.count("\n") == 1, captured.err
    return captured.err


def run_commands(commands: Sequence[Sequence[str | Path]], timeout: float = 900) -> list[Outcome]:
    done = subprocess.run(
        [sys.executable, "-c", _RUNNER],
        input=json.dumps([[str(word) for word in command] for command in commands]),
        capture_output=True,
        text=True,
        timeout=timeout,
        env=environment(),
        check=False,
    )
    outcomes = [Outcome(*json.loads(line)) for line in done.stdout.splitlines()]
    assert len(outcomes) == len(commands), done.stderr[-3000:]
    return outcomes


def run_program(*argv: str | Path) -> subprocess.CompletedProcess[str]:
    """`python ARGV` at the root, as a user runs the programs that are read."""
    return subprocess.run(
        [sys.executable, *map(str, argv)],
        cwd=ROOT,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=900,
        check=False,
    )


def printed_by(module: str, *words: str | Path) -> str:
    """What `python -m MODULE WORDS` prints; it must end well."""
    done = run_program("-m", module, *words)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def assert_refused(outcome: Outcome) -> str:
    """Exit code 2 and one line on stderr, which is returned."""
    assert outcome.code == 2, outcome
    assert outcome.out == ""
    lines = outcome.err.splitlines()
    assert len(lines) == 1, outcome.err
    assert lines[0].startswith("mtd: error: ")
    return lines[0]
