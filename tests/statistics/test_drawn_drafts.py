"""Drawn drafts change no probability: joints of emitted tokens against exact enumeration."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats

import mtd_jax as mtd
from mtd_jax.decoding.heads import Heads
from mtd_jax.decoding.language_model import LanguageModel
from mtd_jax.decoding.sampling import SamplingRows, log_probabilities
from tests.support import heads, tiny

ALPHA = 1e-4
pytestmark = pytest.mark.optimized

DRAWS = 51_200
BATCH = 1024
TOKENS = 4
PROMPT = [3, 4, 5, 3, 4]
SAMPLING: dict[str, Any] = {"temperature": 1.5, "top_k": 3}


def _exact() -> dict[tuple[int, ...], float]:
    """The probability of every continuation of four tokens."""
    model = tiny.language_model()
    joint: dict[tuple[int, ...], float] = {(): 1.0}
    for _ in range(TOKENS):
        longer: dict[tuple[int, ...], float] = {}
        texts = list(joint)
        logits = mtd.logits(model, [[*PROMPT, *text] for text in texts])[:, -1]
        rows = SamplingRows.of([mtd.Sampling(**SAMPLING)] * len(texts))
        log_p = np.asarray(log_probabilities(jnp.asarray(logits), rows), np.float64)
        for text, row in zip(texts, log_p, strict=True):
            for token in np.flatnonzero(np.isfinite(row)):
                longer[(*text, int(token))] = joint[text] * float(np.exp(row[token]))
        joint = longer
    return joint


def _heads(model: LanguageModel, name: str) -> Heads | None:
    """Heads that know a little."""
    if name not in mtd.methods.SPECS:
        return None
    texts = heads.answers(model, [PROMPT, PROMPT[::-1], [9, 8, 7]], 20)
    return heads.fitted(model, texts, name, steps=20, rank=2, tokens=3)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("self_speculative", {"skip_attention": "1", "drafts": 2, "threshold": 0.3}),
        ("self_speculative", {"skip_attention": "1", "drafts": 3, "threshold": 0}),
        ("cp", {"tree": "chain", "acceptance": "rejection"}),
    ],
)
def test_tokens_are_drawn_from_the_model(name: str, options: dict[str, Any]) -> None:
    model = tiny.language_model()
    method = mtd.methods.make_method(name, options, _heads(model, name))
    seen: dict[tuple[int, ...], int] = {}
    accepted = drafted = 0
    for first in range(0, DRAWS, BATCH):
        samplings = [mtd.Sampling(**SAMPLING, seed=seed) for seed in range(first, first + BATCH)]
        done = mtd.generate(
            model,
            method,
            [PROMPT] * BATCH,
            sampling=samplings,
            max_new_tokens=TOKENS,
            batch_size=BATCH,
            ignore_eos=True,
        )
        for completion in done:
            seen[completion.token_ids] = seen.get(completion.token_ids, 0) + 1
            accepted += completion.metrics.accepted
            drafted += completion.metrics.drafted
    assert 0.1 * drafted < accepted < drafted  # both ways are taken, often
    exact = _exact()
    assert seen.keys() <= exact.keys()
    # Rare outcomes together, so that every cell expects enough.
    outcomes = sorted(exact, key=exact.__getitem__, reverse=True)
    common = [o for o in outcomes if exact[o] * DRAWS >= 10]
    rare = [o for o in outcomes if exact[o] * DRAWS < 10]
    counts = [seen.get(o, 0) for o in common] + [sum(seen.get(o, 0) for o in rare)]
    expected = [exact[o] for o in common] + [sum(exact[o] for o in rare)]
    pairs = [(c, e) for c, e in zip(counts, expected, strict=True) if e > 0]
    observed = np.array([c for c, _ in pairs], np.float64)
    wanted = np.array([e for _, e in pairs]) / sum(e for _, e in pairs) * observed.sum()
    assert scipy.stats.chisquare(observed, wanted).pvalue > ALPHA
