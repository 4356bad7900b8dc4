"""Odd values in a training run's file or in --set: one line, whatever they are."""

from __future__ import annotations

from pathlib import Path

import pytest

from mtd_jax.errors import InputError
from mtd_jax.training.config import read_config

_LINES = 'model = "m"\nout = "o"\n[data]\ntrain = ["t"]\n'
_LONG = "0x" + "f" * 5000


@pytest.mark.parametrize(
    ("more", "changes", "message"),
    [
        (f"[optimizer]\nlearning_rate = {'9' * 400}\n", [], "optimizer.learning_rate must be a 64"),
        ("[optimizer]\nepsilon = 0\n", [], "optimizer.epsilon must be at least"),
        ("[optimizer]\nlearning_rate = 1e30\n", [], "optimizer.learning_rate must be at most"),
        (f"[optimizer]\nclip = {_LONG}\n", [], "optimizer.clip must be a 64-bit number"),
        (f"[optimizer]\nsteps = {'9' * 5000}\n", [], "cannot read"),
        (f"[options]\nlist = [[{_LONG}]]\n", [], "options.list must be a 64-bit number"),
        ("", [f"optimizer.steps={_LONG}"], "optimizer.steps must be a 64-bit number"),
        ("", [f"optimizer.steps={'9' * 5000}"], "--set optimizer.steps: "),
        ("", [f"seed={'[' * 100_000}"], "--set seed: "),
    ],
    ids=[
        "float",
        "epsilon",
        "rate",
        "hexadecimal",
        "digits",
        "options",
        "set",
        "set digits",
        "set depth",
    ],
)
def test_odd_values_are_one_line(
    more: str, changes: list[str], message: str, tmp_path: Path
) -> None:
    file = tmp_path / "run.toml"
    file.write_text(_LINES + more, encoding="utf-8")
    with pytest.raises(InputError) as error:
        read_config(file, changes)
    assert str(error.value).startswith(("cannot read", "--set", message))
    assert message in str(error.value)
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 400
