"""Heads as a user meets them: trained, looked at, decoded with, proved lossless, measured."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from tests.support.command_line import assert_refused, printed_by, run_commands
from tests.support.training import write_config, write_place

BUDGET = ("--max-new-tokens", "16")


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_place(tmp_path_factory.mktemp("heads-cli"))


def test_from_a_config_to_a_speed(place: Path) -> None:
    model, prompts, out = place / "model", place / "prompts.jsonl", place / "medusa"
    config = write_config(
        place,
        "medusa.toml",
        out=str(out),
        method="medusa",
        options__count=2,
        options__vocabulary=64,
        options__acceptance="exact",
        evaluate__prompts=str(prompts),
        evaluate__new_tokens=8,
    )
    heads: tuple[str | Path, ...] = ("--method", "medusa", "--heads", out / "heads")
    decode: list[str | Path] = [
        "generate",
        "--model",
        model,
        "--prompts",
        prompts,
        *BUDGET,
        "--json",
    ]
    proof: list[str | Path] = [
        "verify",
        "--model",
        model,
        "--prompts",
        prompts,
        *BUDGET,
        "--json",
        *heads,
    ]
    race: list[str | Path] = [
        "bench",
        "--model",
        model,
        "--prompts",
        prompts,
        *BUDGET,
        "--json",
        "--repeats",
        "1",
    ]
    look, done, seen, table, there, back = run_commands(
        [
            ["train", config, "--dry-run", "--json"],
            ["train", config, "--json"],
            ["inspect", out / "heads", "--json"],
            ["inspect", out / "heads"],
            [
                *("convert", "to-medusa", out / "heads", place / "vllm"),
                *("--model", model, "--layout", "vllm"),
            ],
            ["convert", "from-medusa", place / "vllm", place / "back", "--model", model],
        ]
    )
    assert done.code == 0, done.err
    plain, tree, auto, verified, raced = run_commands(
        [
            decode,
            [*decode, *heads, "--option", "tree=2x1", "--batch-size", "2"],
            [*decode, *heads, "--temperature", "0.5", "--seed", "3"],
            [*proof, "--option", "tree=chain"],
            [*race, "--methods", "ar,medusa:tree=chain", "--heads", out / "heads"],
        ]
    )
    outcomes = (look, done, plain, tree, auto, verified, raced, seen, table, there, back)
    assert [o.code for o in outcomes] == [0] * len(outcomes), [o.err for o in outcomes if o.code]
    assert json.loads(look.out)["method"] == "medusa"
    assert json.loads(look.out)["frozen_parameters"] > json.loads(look.out)["trainable_parameters"]
    assert json.loads(done.out)["finished"]
    assert not (out / "model").exists()
    log = [json.loads(line) for line in (out / "log.jsonl").read_text("utf-8").splitlines()]
    facts = {key: value for line in log for key, value in line.items()}
    assert facts["held_out_decoded_as_before"] == 1.0
    assert facts["held_out_decoded_tokens_per_forward"] >= 1.0
    assert {"accuracy_1", "accuracy_2", "held_out_accuracy_2"} <= facts.keys()
    answers = [o["token_ids"] for o in json.loads(plain.out)["outputs"]]
    assert [o["token_ids"] for o in json.loads(tree.out)["outputs"]] == answers
    assert json.loads(tree.out)["metrics"]["num_draft_tokens"] > 0
    assert json.loads(verified.out)["passed"]
    row = json.loads(raced.out)["rows"][1]
    assert row["identical_to_ar"]
    assert row["lossless"]
    summary = json.loads(seen.out)
    assert summary["options"] == {"acceptance": "exact", "count": 2, "vocabulary": 64}
    assert len(summary["record"]["vocabulary"]) == 64
    assert summary["record"]["steps"] == 6
    assert len(summary["record"]["accuracies"]) == 2
    assert "right, place 2" in table.out
    assert (place / "back" / "method.json").is_file()


@pytest.mark.slow
def test_independent_heads_are_trained_with_their_trunk(place: Path) -> None:
    """The model learns too, and what its heads draft is verified by it."""
    out = place / "whole"
    options = {"options__count": 2, "options__trunk": "trained"}
    config = write_config(place, "whole.toml", out=str(out), method="independent_heads", **options)
    (trained,) = run_commands([["train", config, "--json"]])
    assert trained.code == 0, trained.err
    log = [json.loads(line) for line in (out / "log.jsonl").read_text("utf-8").splitlines()]
    for name in ("held_out_next", "held_out_loss"):
        found = [line[name] for line in log if name in line]
        assert found[-1] < found[0]
    (verified,) = run_commands(
        [
            [
                *("verify", "--model", out / "model", "--method", "independent_heads"),
                *("--heads", out / "heads", "--option", "tree=2x1", "--json"),
                *("--prompts", place / "prompts.jsonl", "--max-new-tokens", "12"),
            ]
        ]
    )
    assert verified.code == 0, verified.err
    assert json.loads(verified.out)["passed"]


def test_slips_are_refused_in_one_line(place: Path) -> None:
    model = place / "model"
    generate: list[str | Path] = ["generate", "--model", model, "--prompt", "the", "--method"]
    slips: dict[str, list[str | Path]] = {
        "train them with `mtd train`": [*generate, "medusa"],
        "no heads at nowhere": [*generate, "medusa", "--heads", "nowhere"],
        "no method.json": [*generate, "medusa", "--heads", model],
        "did you mean 'tree'": [*generate, "medusa", "--option", "tre=chain"],
        "no heads at": ["convert", "from-medusa", "nowhere", place / "x", "--model", model],
    }
    for name, words in {
        "count": "count must be between 1 and 16",
        "los": "(did you mean 'loss'?)",
        "decay": "decay must be over 0",
        "own_output": "must be true or false",
    }.items():
        config = write_config(place, f"{name}.toml", method="medusa", **{f"options__{name}": 0})
        slips[words] = ["train", config, "--dry-run"]
    config = write_config(place, "freeze.toml", method="medusa", freeze=["embedding"])
    slips["leave out freeze"] = ["train", config, "--dry-run"]
    short = {"data__length": 4, "data__overlong": "split", "options__count": 3}
    config = write_config(place, "short.toml", method="medusa", **short)
    slips["medusa has nothing to learn for head_3"] = ["train", config, "--dry-run"]
    for (words, _), outcome in zip(slips.items(), run_commands(list(slips.values())), strict=True):
        assert words in assert_refused(outcome)


@pytest.mark.slow
def test_the_program_on_one_page(place: Path) -> None:
    words: list[str | Path] = [
        "--model",
        place / "model",
        "--data",
        place / "texts-0.jsonl",
        "--out",
        place / "page",
    ]
    short: list[str | Path] = ["--steps", "3", "--length", "48"]
    assert "step 3" in printed_by("train.medusa", *words, *short)
    assert json.loads((place / "page" / "method.json").read_text())["method"] == "medusa"
    shutil.rmtree(place / "page")
    assert "--method hydra" in printed_by("train.medusa", *words, *short, "--method", "hydra")
    assert json.loads((place / "page" / "method.json").read_text())["method"] == "hydra"
