"""Checkpoints of a run that was stopped: which are kept, and that they decode."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from mtd_jax.convert.native import read_info
from mtd_jax.errors import InputError
from mtd_jax.training.checkpoint import Checkpoints
from mtd_jax.training.config import CheckpointConfig
from mtd_jax.training.heads import HeadsTraining
from mtd_jax.training.loop import fit
from tests.support.command_line import assert_refused, run_commands
from tests.support.training import log_of, make_run, write_config, write_place

# So fast that the held-out loss rises again: 7 behind step 2, 11 behind step 4.
TOO_FAST: dict[str, Any] = {
    "optimizer__learning_rate": 0.5,
    "optimizer__schedule": "constant",
    "evaluate__every": 2,
    "checkpoint__every": 2,
    "checkpoint__keep_last": 1,
}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_place(tmp_path_factory.mktemp("export"))


def _stopped_at(step: int, place: Path, **changes: Any) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            "mtd_jax.training.preemption.StopRequest.reached", lambda self, now: now == step
        )
        outcome = fit(make_run(place, **changes))
    assert not outcome.finished


@pytest.fixture(scope="module")
def stopped(place: Path) -> Path:
    """A run that was stopped behind step 4 of 6, as by SIGTERM; returns its config."""
    changes = {**TOO_FAST, "out": str(place / "stopped")}
    _stopped_at(4, place, **changes)
    assert not (place / "stopped" / "model").exists()
    return write_config(place, "stopped.toml", **changes)


def test_a_stopped_run_is_exported_and_decodes(place: Path, stopped: Path) -> None:
    model = place / "stopped" / "model"
    decode: list[str | Path] = ["generate", "--model", model]
    decode += ["--prompt", "the fox", "--max-new-tokens", "4"]
    before = sorted(p.name for p in (place / "stopped" / "checkpoints").iterdir())
    best, decoded = run_commands([["train", stopped, "--export", "best", "--json"], decode])
    assert best.code == decoded.code == 0, best.err + decoded.err
    assert json.loads(best.out) == {"exported": str(model), "step": 2}
    first = read_info(model)
    last, decoded, named = run_commands(
        [["train", stopped, "--export", "last"], decode, ["train", stopped, "--export", "2"]]
    )
    assert last.code == decoded.code == named.code == 0, last.err + decoded.err + named.err
    assert last.out == f"{model}: the checkpoint behind step 4\n"
    assert read_info(model).fingerprint == first.fingerprint  # of step 2, again
    assert "sft, 2 steps from tiny-base" in first.source
    assert sorted(p.name for p in (place / "stopped" / "checkpoints").iterdir()) == before


def test_heads_of_a_stopped_run_are_exported(place: Path) -> None:
    changes = {"method": "medusa", "out": str(place / "medusa")}
    _stopped_at(3, place, **changes)
    config = write_config(place, "medusa.toml", **changes)
    heads = place / "medusa" / "heads"
    decode: list[str | Path] = ["generate", "--model", place / "model", "--method", "medusa"]
    decode += ["--heads", heads]
    export, decoded = run_commands(
        [
            ["train", config, "--export", "last"],
            [*decode, "--prompt", "the fox", "--max-new-tokens", "4"],
        ]
    )
    assert export.code == decoded.code == 0, export.err + decoded.err
    record = json.loads((heads / "method.json").read_text(encoding="utf-8"))
    assert "accuracies" in json.dumps(record)  # measured as at the end of a run


def test_what_cannot_be_exported(place: Path, stopped: Path) -> None:
    never = write_config(place, "never.toml", out=str(place / "never"))
    slips: dict[str, list[str | Path]] = {
        "no checkpoint in": [never, "--export", "last"],
        "no checkpoint behind step 3 in": [stopped, "--export", "3"],
        "(there are 2, 4)": [stopped, "--export", "3"],
        "best, last or a step, got 'newest'": [stopped, "--export", "newest"],
        "was evaluated on the held-out texts of the config (there are 2, 4)": [
            *(stopped, "--export", "best", "--set", "evaluate.batches=1"),
        ],
        "do not go together": [stopped, "--export", "last", "--dry-run"],
        "made with optimizer.steps = 6": [
            *(stopped, "--export", "last", "--set", "optimizer.steps=9"),
        ],
    }
    outcomes = run_commands([["train", *words] for words in slips.values()])
    for words, outcome in zip(slips, outcomes, strict=True):
        assert words in assert_refused(outcome)
    assert not (place / "never").exists()


def test_the_step_at_which_a_run_was_stopped_can_be_the_best(place: Path) -> None:
    """Stopped at an evaluation: its checkpoint outlives newer ones that are worse."""
    out = place / "preempted"
    changes = {**TOO_FAST, "out": str(out), "optimizer__steps": 4, "checkpoint__every": 4}
    _stopped_at(2, place, **changes)
    run = make_run(place, **changes)
    assert fit(run).finished
    losses = {x["step"]: x["held_out_loss"] for x in log_of(out) if "held_out_loss" in x}
    assert losses[2] < losses[4]
    checkpoints = Checkpoints(
        out / "checkpoints", CheckpointConfig(), measured_on=run.measured_on(), read_only=True
    )
    assert (checkpoints.best, checkpoints.latest) == (2, 4)
    checkpoints.close()


def test_another_models_checkpoint_is_refused_before_heads_are_made(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Making them compiles a program; through the command line it is one line, exit code 2."""
    out = str(tmp_path / "medusa")
    _stopped_at(1, place, method="medusa", out=out)
    other = write_place(tmp_path)
    info = other / "model" / "config.json"
    text = info.read_text(encoding="utf-8")
    info.write_text(text.replace("tiny-base", "another-base"), encoding="utf-8")
    config = write_config(tmp_path, method="medusa", out=out)
    (outcome,) = run_commands([["train", config]])
    assert "the checkpoint in `out` is of another model" in assert_refused(outcome)

    def split(self: HeadsTraining, params: Any) -> Any:
        raise AssertionError

    run = make_run(tmp_path, method="medusa", out=out)
    monkeypatch.setattr(HeadsTraining, "split", split)
    with pytest.raises(InputError, match="of another model"):
        fit(run)
