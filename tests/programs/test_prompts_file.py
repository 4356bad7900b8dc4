"""What a line of a prompts file may ask for, beside the flags of the command."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import mtd_jax as mtd
from mtd_jax.cli.main import main
from mtd_jax.decoding.requests import read_prompts
from tests.support.checkpoints import hf_config, write_hf

SEEDS = [None, 0, 1, 1, 2**63 - 1, 3]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_hf(tmp_path_factory.mktemp("model"), hf_config(eos_token_id=None))


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    lines: list[dict[str, Any]] = [{"token_ids": [5, 6, 7], "seed": seed} for seed in SEEDS]
    path = tmp_path / "prompts.jsonl"
    path.write_text("\n".join(json.dumps(line) for line in lines))
    return path


def test_seeds_of_lines(model: Path, prompts: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """--seed is that of lines without one; equal prompts differ by their seeds alone."""
    argv = ["generate", "--model", str(model), "--prompts", str(prompts), "--json"]
    argv += ["--temperature", "1", "--max-new-tokens", "12", "--batch-size", "4"]
    answers: list[list[tuple[int, ...]]] = []
    for seed in ("0", "3"):
        assert main([*argv, "--seed", seed]) == 0
        report = json.loads(capsys.readouterr().out)
        answers.append([tuple(output["token_ids"]) for output in report["outputs"]])
    default, zero, one, again, largest, three = answers[0]
    assert default == zero
    assert one == again
    assert len({zero, one, largest, three}) == 4
    assert answers[1] == [three, *answers[0][1:]]


def test_a_prompts_seed_goes_before_its_sampling(model: Path) -> None:
    loaded, method = mtd.load(model), mtd.methods.autoregressive()
    asked = [mtd.Sampling(temperature=1.0, seed=seed) for seed in (1, 2, 2)]
    prompts = [mtd.Prompt("a", token_ids=(5, 6), seed=seed) for seed in (None, 1, None)]
    done = mtd.generate(loaded, method, prompts, sampling=asked, max_new_tokens=12)
    assert done[0].token_ids == done[1].token_ids != done[2].token_ids


def test_names_are_text(tmp_path: Path) -> None:
    path = tmp_path / "prompts.jsonl"
    lines = [{"prompt": "a", "id": 3, "category": ["x"]}, {"prompt": "b", "category": 5}]
    path.write_text("\n".join(json.dumps(line) for line in lines))
    assert [(p.id, p.category) for p in read_prompts(path)] == [("3", "['x']"), ("1", "5")]
