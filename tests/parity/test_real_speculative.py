"""Drafting on the real model: the tokens of plain decoding, and drafts that are worth it."""

from __future__ import annotations

from typing import Any

import pytest

import mtd_jax as mtd
from mtd_jax.convert.heads import shipped_heads
from mtd_jax.convert.load import load_as_stored
from mtd_jax.evaluation.losslessness import verify
from tests.support.real import model_directory

pytestmark = [pytest.mark.slow, pytest.mark.optimized]

PROMPTS = (
    "Repeat this list three times:\n- apples\n- pears\n- a loaf of bread\n- two bottles of milk",
    "Rename the variable x to total and print the whole function again:\n\n"
    "def add(values):\n    x = 0\n    for value in values:\n        x = x + value\n    return x\n",
    "Why is the sky blue?",
)
METHODS = {
    "ngram": (mtd.methods.ngram(drafts=7), 1.5),
    "tree": (mtd.methods.ngram(branches="2x2x1"), 1.5),
    "prompt_lookup": (mtd.methods.prompt_lookup(drafts=7), 1.5),
    "self_speculative": (mtd.methods.self_speculative(skip_attention="5", drafts=3), 2.0),
}


@pytest.fixture(scope="module")
def model() -> mtd.LanguageModel:
    """Layers as one scan, which compiles faster than as `load` lays them out.

    As a user has them they are decoded in test_real_model.py and, with drafts, by
    benchmarks/lossless.py.
    """
    return load_as_stored(model_directory())


@pytest.mark.parametrize("name", METHODS)
def test_tokens_are_those_of_plain_decoding(model: mtd.LanguageModel, name: str) -> None:
    """The floor is what is seen now, less a margin: acceptance that breaks down fails here."""
    method: Any
    method, floor = METHODS[name]
    report = verify(model, method, PROMPTS, max_new_tokens=40, batch_size=3)
    assert report.passed, report.to_dict()
    done = mtd.generate(model, method, PROMPTS[:2], max_new_tokens=40, batch_size=3)
    for completion in done:
        assert (completion.metrics.mean_acceptance_length or 0) >= floor, completion


@pytest.mark.parametrize(
    ("name", "floor"),
    [("medusa", 0.007), ("hidden_transfer", 0.02), ("cp", 0.01), ("hydra", 0.02)],
)
def test_heads_that_come_with_the_package(
    model: mtd.LanguageModel, name: str, floor: float
) -> None:
    """Found by the model's fingerprint; of what a tree drafts, half of what is now accepted is."""
    directory = shipped_heads(name, model)
    assert directory is not None
    heads = mtd.load_heads(directory, model)
    assert heads.accuracies is not None
    method = mtd.methods.make_method(name, {"tree": "2x2x1"}, heads)
    report = verify(model, method, PROMPTS, max_new_tokens=40, batch_size=3).to_dict()
    assert report["passed"], report
    assert report["num_accepted_draft_tokens"] > floor * report["num_draft_tokens"], report
