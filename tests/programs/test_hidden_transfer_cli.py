"""Hidden Transfer as a user meets it: swept, trained, looked at, decoded with, proved lossless."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from tests.support.command_line import assert_refused, printed_by, run_commands
from tests.support.training import write_config, write_place


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_place(tmp_path_factory.mktemp("hidden-transfer-cli"), num_layers=3)


def _config(place: Path, name: str = "config.toml", **changes: object) -> Path:
    changes = {"out": str(place / "run"), "options__count": 2, "evaluate__every": 0} | changes
    return write_config(place, name, method="hidden_transfer", **changes)


def test_from_a_sweep_to_a_proof(place: Path) -> None:
    config, out, sweep = _config(place), place / "run", place / "sweep"
    search: list[str | Path] = ["sweep", "hidden-transfer", config, "--out", sweep, "--steps", "4"]
    task: list[str | Path] = [
        *("--model", place / "model", "--prompts", place / "prompts.jsonl"),
        *("--max-new-tokens", "12", "--json"),
    ]
    heads: list[str | Path] = ["--method", "hidden_transfer", "--heads"]
    swept, done, seen, plain, tree, verified = run_commands(
        [
            [*search, "--json"],
            ["train", config, "--set", "options.layers='2,1'", "--set", "evaluate.every=3"],
            ["inspect", out / "heads", "--json"],
            ["generate", *task],
            ["generate", *task, *heads, out / "heads", "--option", "tree=2x1"],
            ["verify", *task, *heads, sweep / "layer-1" / "heads", "--option", "pseudo=all"],
        ]
    )
    assert swept.code == 0, swept.err
    report = json.loads(swept.out)
    assert [row["layer"] for row in report["rows"]] == [1, 2]
    assert all(0 <= share <= 1 for row in report["rows"] for share in row["top1"])
    assert report["finished"]
    assert len(report["best_layers"]) == 2
    assert done.code == 0, done.err
    facts = json.loads(seen.out)
    assert facts["options"] == {"count": 2, "layers": "2,1"}
    assert len(facts["record"]["accuracies"]) == 2
    assert [o["token_ids"] for o in json.loads(tree.out)["outputs"]] == [
        o["token_ids"] for o in json.loads(plain.out)["outputs"]
    ]
    assert json.loads(tree.out)["metrics"]["num_draft_tokens"] > 0
    assert verified.code == 0, verified.err
    assert json.loads(verified.out)["passed"]

    # A finished layer is not trained again, a missing one is; other settings do not mix.
    shutil.rmtree(sweep / "layer-2")
    kept = (sweep / "layer-1" / "log.jsonl").stat().st_mtime_ns
    again, other = run_commands([search, [*search, "--set", "seed=1"]])
    assert again.code == 0, again.err
    assert "layer 1 (1 of 2): trained before" in again.err
    assert "tokens a pass" in again.out
    assert (sweep / "layer-1" / "log.jsonl").stat().st_mtime_ns == kept
    assert json.loads((sweep / "sweep.json").read_text("utf-8"))["rows"] == report["rows"]
    assert (sweep / "sweep.png").stat().st_size > 1000
    assert "made with seed = 0" in assert_refused(other)


def test_slips_are_refused_in_one_line(place: Path) -> None:
    generate: list[str | Path] = ["generate", "--model", place / "model", "--prompt", "the"]
    sweep: list[str | Path] = ["sweep", "hidden-transfer", "--out", place / "nothing"]
    good, sft = _config(place), write_config(place, "sft.toml")
    slips: dict[str, list[str | Path]] = {
        "train them with `mtd train`": [*generate, "--method", "hidden_transfer"],
        "no heads at nowhere": [*generate, "--method", "hidden_transfer", "--heads", "nowhere"],
        "is for method 'sft'": [*sweep, sft],
        "between 1 and 2 in a model of 3, got 3": [*sweep, good, "--layers", "1-3"],
        "takes layer numbers": [*sweep, good, "--layers", "one"],
        "optimizer.steps must be at least 1": [*sweep, good, "--steps", "0"],
        "held-out texts": [*sweep, good, "--set", "data.held_out_fraction=0"],
        "(did you mean 'layers'?)": ["train", good, "--set", "options.layer=2", "--dry-run"],
        "one number, or 2 of them": ["train", good, "--set", "options.layers='1,2,2'"],
        "under the model's width": ["train", good, "--set", "options.rank=99", "--dry-run"],
    }
    for (words, _), outcome in zip(slips.items(), run_commands(list(slips.values())), strict=True):
        assert words in assert_refused(outcome)
    assert not (place / "nothing").exists()


@pytest.mark.slow
def test_the_programs_on_one_page(place: Path) -> None:
    page = place / "page"
    model = ("--model", place / "model")
    texts = ("--data", place / "texts-0.jsonl")
    few = ("--steps", "3", "--length", "48", "--layers", "1,2,2")
    assert "step 3" in printed_by("train.hidden_transfer", *model, *texts, "--out", page, *few)
    budget = ("--prompt", "the fox", "--max-new-tokens", "12")
    drafted = printed_by("infer.hidden_transfer", *model, "--heads", page, *budget)
    (plain,) = run_commands([["generate", *model, *budget, "--json"]])
    assert json.loads(plain.out)["outputs"][0]["text"] in drafted
    assert "tokens a pass" in drafted
