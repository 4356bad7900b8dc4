"""CP heads as a user meets them: over a model that stays, and trained together with it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import mtd_jax as mtd
from tests.support import heads
from tests.support.command_line import ROOT, assert_refused, printed_by, run_commands
from tests.support.training import write_config, write_place


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_place(tmp_path_factory.mktemp("cp-cli"))


@pytest.mark.parametrize("trunk", ["frozen", pytest.param("trained", marks=pytest.mark.slow)])
def test_from_a_config_to_a_proof(place: Path, trunk: str) -> None:
    out, whole = place / trunk, trunk == "trained"
    config = write_config(
        place,
        f"{trunk}.toml",
        out=str(out),
        method="cp",
        options__tokens=3,
        options__rank=2,
        options__balance=0.01,
        options__trunk=trunk,
        options__loss="joint" if whole else "distillation",
        options__vocabulary=0 if whole else 64,
        evaluate__prompts=str(place / "prompts.jsonl"),
        evaluate__new_tokens=8,
    )
    trained = run_commands([["train", config, "--dry-run", "--json"], ["train", config, "--json"]])
    assert [o.code for o in trained] == [0, 0], [o.err for o in trained]
    assert (json.loads(trained[0].out)["frozen_parameters"] == 0) == whole
    log = [json.loads(line) for line in (out / "log.jsonl").read_text("utf-8").splitlines()]
    facts = {key: value for line in log for key, value in line.items()}
    assert {"joint", "conditional_1", "conditional_3", "usage_entropy"} <= facts.keys()
    assert {"responsibility_2", "held_out_joint"} <= facts.keys()
    assert facts["held_out_loss"] < next(x["held_out_loss"] for x in log if "held_out_loss" in x)
    if not whole:
        assert facts["held_out_decoded_as_before"] == 1.0

    words: list[str | Path] = [
        *("--model", out / "model" if whole else place / "model"),
        *("--method", "cp", "--heads", out / "heads"),
        *("--prompts", place / "prompts.jsonl", "--max-new-tokens", "12", "--json"),
    ]
    raced: list[str | Path] = [
        *("bench", "--methods", "ar,cp:tree=2x1", "--repeats", "1", *words[:2]),
        *("--heads", out / "heads", "--prompts", place / "prompts.jsonl", "--max-new-tokens", "4"),
    ]
    seen, verified, drawn, race = run_commands(
        [
            ["inspect", out / "heads", "--json"],
            ["verify", *words, "--option", "tree=2x1"],
            ["generate", *words, "--option", "acceptance=rejection", "--temperature", "0.7"],
            raced,
        ]
    )
    assert [o.code for o in (seen, verified, drawn, race)] == [0] * 4, [seen.err, verified.err]
    # Heads that were trained with their trunk make another model of it.
    assert ("cp:tree=2x1 is another model than ar" in race.out) == whole
    assert json.loads(verified.out)["passed"]
    summary = json.loads(seen.out)
    assert summary["options"]["rank"] == 2
    assert len(summary["record"]["accuracies"]) == 2
    assert len(json.loads(drawn.out)["outputs"]) == 2


def test_heads_of_one_method_race(place: Path) -> None:
    """`--methods` says by what they were trained with which is meant."""
    model = mtd.load(place / "model")
    paths: list[str | Path] = []
    for rank in (1, 2):
        found = heads.random(model, "cp", tokens=3, rank=rank, factor=4)
        paths.append(heads.write(found, place / f"rank-{rank}"))
    race: list[str | Path] = [
        *("bench", "--model", place / "model", "--prompts", place / "prompts.jsonl", "--json"),
        *("--repeats", "1", "--max-new-tokens", "4", "--heads", *paths, "--methods"),
    ]
    raced, unclear, unknown, idle = run_commands(
        [
            [*race, "ar,cp:rank=1:tree=chain,cp:rank=2:tree=chain"],
            [*race, "ar,cp:tree=chain"],
            [*race, "ar,cp:rank=1,cp:rank=8"],
            [*race, "ar,cp:rank=2"],
        ]
    )
    assert raced.code == 0, raced.err
    rows = json.loads(raced.out)["rows"]
    assert [row["identical_to_ar"] for row in rows] == [True] * 3
    # One run has no spread, which is not a spread of nothing.
    assert [(row["spread"], row["speedup_range"]) for row in rows] == [(None, None)] * 3
    assert "2 of --heads fit 'cp:tree=chain'" in assert_refused(unclear)
    assert "none of --heads fit 'cp:rank=8'" in assert_refused(unknown)
    assert "rank-1 is for method 'cp': --methods names none such" in assert_refused(idle)


def test_slips_are_refused_in_one_line(place: Path) -> None:
    slips: dict[str, list[str | Path]] = {}
    cases: list[tuple[dict[str, object], str]] = [
        ({"tokens": 1}, "tokens must be between 2 and 16"),
        ({"rank": 0}, "rank must be between 1 and 64"),
        ({"factor": -1}, "factor must be at least 0"),
        ({"beta": 2.0}, "beta must be between 0 and 1"),
        ({"gamma": 0.0}, "gamma must be over 0"),
        ({"balance": -1.0}, "balance must be at least 0"),
        ({"trunk": "trained"}, "say loss=joint"),
        ({"ranks": 2}, "did you mean 'rank'"),
    ]
    for number, (options, words) in enumerate(cases):
        named = {f"options__{name}": value for name, value in options.items()}
        config = write_config(place, f"slip-{number}.toml", method="cp", **named)
        slips[words] = ["train", config, "--dry-run"]
    for (words, _), outcome in zip(slips.items(), run_commands(list(slips.values())), strict=True):
        assert words in assert_refused(outcome)


@pytest.mark.slow
def test_the_programs_on_one_page(place: Path) -> None:
    shape, plain = place / "shape.toml", place / "plain.jsonl"
    lines = (place / "texts-0.jsonl").read_text("utf-8").splitlines(keepends=True)
    plain.write_text("".join(line for line in lines if "text" in json.loads(line)), "utf-8")
    data = ("--data", plain)  # bytes have no chat template
    shape.write_text(
        (ROOT / "configs/models/byte-6m.toml")
        .read_text("utf-8")
        .replace("num_layers = 7", "num_layers = 1"),
        "utf-8",
    )
    assert "parameters" in printed_by("train.fresh", "--shape", shape, "--out", place / "fresh")
    size = (*data, "--steps", "3", "--length", "48", "--rank", "2")
    whole = place / "page-whole"
    said = printed_by(
        "train.cp", "--model", place / "fresh", *data, "--out", whole, *size, "--trunk"
    )
    assert "step 3" in said
    assert (whole / "heads" / "method.json").is_file()
    assert (whole / "model" / "config.json").is_file()
    learned = place / "page-heads"
    assert "step 3" in printed_by(
        "train.cp", "--model", place / "model", *data, "--out", learned, *size
    )
    words = ("--model", place / "model", "--heads", learned, "--token-ids", "5,6,7")
    assert "tokens a pass" in printed_by("infer.cp", *words, "--max-new-tokens", "12")
    # Trained together, the two decode the mixture's own first token.
    words = ("--model", whole / "model", "--heads", whole / "heads", "--token-ids", "5,6,7")
    said = printed_by("infer.cp", *words, "--max-new-tokens", "12")
    model = mtd.load(whole / "model")
    undrafted = mtd.methods.cp(mtd.load_heads(whole / "heads", model), tree="none")
    (answer,) = mtd.generate(model, undrafted, [[5, 6, 7]], max_new_tokens=12)
    assert model.tokenizer is not None
    expected = model.tokenizer.decode(list(answer.token_ids))
    assert expected
    assert said.startswith(expected)
