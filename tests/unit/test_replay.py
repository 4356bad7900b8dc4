"""Replayed answers take the passes that decoding them took, and kinds are counted as defined."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

import mtd_jax as mtd
from benchmarks.replay import Answer, kinds, replay
from mtd_jax import methods
from tests.support import tiny

COSTS = (1.0, 1.4, 1.6, 2.0)
NEW_TOKENS = 60


@pytest.mark.parametrize("batch_size", [1, 3])
@pytest.mark.parametrize("make", [methods.ngram, methods.prompt_lookup])
def test_a_replay_takes_the_passes_that_decoding_takes(make: Any, batch_size: int) -> None:
    model = tiny.language_model()
    rng = np.random.default_rng(3)
    texts = [rng.integers(3, 20, size).tolist() for size in (9, 30, 17)]
    method = make().replace(costs=jnp.asarray(COSTS, jnp.float32))
    prompts = [mtd.Prompt(str(i), token_ids=tuple(text)) for i, text in enumerate(texts)]
    done = mtd.generate(
        model, method, prompts, max_new_tokens=NEW_TOKENS, batch_size=batch_size, ignore_eos=True
    )
    answers = [
        Answer(np.array([*text, *completion.token_ids], np.int32), len(text))
        for text, completion in zip(texts, done, strict=True)
    ]
    limits = {"batch_size": batch_size, "max_new_tokens": NEW_TOKENS}
    replayed = replay(method, COSTS, answers, **limits)
    assert replayed["passes"] == sum(c.metrics.forwards - 1 for c in done)
    assert replayed["tokens"] == 3 * (NEW_TOKENS - 1) > 1.2 * replayed["passes"]


def test_kinds_are_counted() -> None:
    """Behind each token of an answer, drafts up to the first that was wrong."""
    method = methods.ngram(longest=2)
    # The first token of an answer is the prompt's; nothing is known of what follows a first 4.
    assert kinds(method, [Answer(np.array([1, 2, 3, 1, 2, 4, 4]), 5)]) == []
    # Behind 1 2 3 1 2: 3 and 1 are right, 2 is not; behind one more token 1 is and 2 is not; then
    # 2 is not.
    counted = kinds(method, [Answer(np.array([1, 2, 3, 1, 2, 3, 1, 4]), 4)])
    assert counted == [{"match": 2, "agree": "the only one", "drafts": 6, "right": 3}]
