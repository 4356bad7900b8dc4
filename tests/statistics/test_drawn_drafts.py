"""Drawn drafts change no probability: joints of emitted tokens against exact enumeration."""

from __future__ import annotations

import collections
import dataclasses
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats

import mtd_jax as mtd
from mtd_jax.decoding import engine
from mtd_jax.decoding.heads import Heads
from mtd_jax.decoding.language_model import LanguageModel
from mtd_jax.decoding.method import Requests
from mtd_jax.decoding.sampling import SamplingRows
from mtd_jax.transformer.model import Parameters
from tests.oracle import cp_mixture as cp_oracle
from tests.oracle import dmtd as dmtd_oracle
from tests.oracle import sampling as sampling_oracle
from tests.oracle import transformer as oracle
from tests.support import heads, tiny

ALPHA = 1e-4
pytestmark = pytest.mark.optimized

DRAWS = 51_200
BATCH = 5120
TOKENS = 4
# Few tokens and few slots: most of the time goes into sorting vocabularies and reading the cache.
VOCAB = 13
PROMPTS = ([3, 4, 5, 3, 4], [6, 1, 6])
"""The rows of a batch have them by turns."""
DMTD = {"early": 1, "late": 1}
WHOLE = {"trunk": "trained", "loss": "joint"}


class _Drawn(NamedTuple):
    texts: collections.Counter[tuple[int, ...]]
    """(which prompt, new tokens) of all rows."""
    drafted: int
    accepted: int


def _exact(
    name: str, params: Parameters, found: Heads | None, sampling: mtd.Sampling
) -> dict[tuple[int, ...], float]:
    """The probability of each prompt with every continuation of four tokens."""
    joint: dict[tuple[int, ...], float] = {}
    for which, prompt in enumerate(PROMPTS):
        ways: dict[tuple[int, ...], float] = {(which,): 1 / len(PROMPTS)}
        for _ in range(TOKENS):
            ways = {
                (*way, token): chance * p
                for way, chance in ways.items()
                for token, p in enumerate(_next(name, params, found, prompt, [*way[1:]], sampling))
                if p > 0
            }
        joint |= ways
    return joint


def _next(
    name: str,
    params: Parameters,
    found: Heads | None,
    prompt: list[int],
    answer: list[int],
    sampling: mtd.Sampling,
) -> list[float]:
    """What plain decoding draws the next token from; of DMTD, cycles of one.

    Of CP heads that were trained with their trunk, the mixture's first token.
    """
    text = [*prompt, *answer]
    if found is not None and found.options.get("trunk") == "trained":
        logits = cp_oracle.first(found.weights, params, text)
    elif name == "dmtd":
        places = dmtd_oracle.places(len(text), len(prompt), 1, "prompt")
        logits = dmtd_oracle.logits(params, text, places, **DMTD)[-1]
    else:
        logits = oracle.logits(params, text)[-1]
    s = sampling
    logits = sampling_oracle.penalized(
        *(logits, prompt, answer),
        *(s.repetition_penalty, s.presence_penalty, s.frequency_penalty),
    )
    p = sampling_oracle.probabilities(logits, s.temperature, s.top_k, s.top_p, s.min_p)
    return [float(x) for x in p]


def _drawn(method: Any, params: Parameters, sampling: mtd.Sampling) -> _Drawn:
    """The engine alone: what is done for each row on the host would take most of the time."""
    which = np.arange(BATCH) % len(PROMPTS)
    tokens = np.zeros((BATCH, max(map(len, PROMPTS))), np.int32)
    for row, prompt in enumerate(which):
        tokens[row, : len(PROMPTS[prompt])] = PROMPTS[prompt]
    lengths = np.array([len(PROMPTS[prompt]) for prompt in which], np.int32)
    capacity = tokens.shape[1] + TOKENS + method.rows_per_step
    texts: collections.Counter[tuple[int, ...]] = collections.Counter()
    drafted = accepted = 0
    for first in range(0, DRAWS, BATCH):
        own = [dataclasses.replace(sampling, seed=first + row) for row in range(BATCH)]
        requests = Requests(
            budget=jnp.full(BATCH, TOKENS, jnp.int32),
            stop_ids=jnp.full(1, -1, jnp.int32),
            sampling=SamplingRows.of(own),
        )
        prompts = jnp.asarray(tokens), jnp.asarray(lengths)
        state, begun = engine.start(method, params, *prompts, requests, capacity)
        state, rest = engine.run(method, params, state, engine.MAX_ROUNDS)
        assert not state.active.any()
        assert (begun.count == 1).all()
        assert (rest.count == TOKENS - 1).all()
        emitted = np.concatenate([begun.tokens[:, :1], rest.tokens[:, : TOKENS - 1]], axis=1)
        texts.update(map(tuple, np.concatenate([which[:, None], emitted], axis=1).tolist()))
        drafted += int(state.tally.drafted.sum())
        histogram = np.asarray(state.tally.histogram).sum(axis=0)
        accepted += int(histogram @ np.arange(len(histogram)))
    return _Drawn(texts, drafted, accepted)


def _heads(model: LanguageModel, name: str, trained: dict[str, Any]) -> Heads | None:
    """Heads that know a little."""
    if name not in mtd.methods.SPECS:
        return None
    texts = heads.answers(model, [*PROMPTS, PROMPTS[0][::-1], [9, 8, 7]], 20)
    return heads.fitted(model, texts, name, steps=20, rank=2, tokens=4, **trained)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "options", "sampling"),
    [
        (
            "self_speculative",
            {"skip_attention": "1", "drafts": 2, "threshold": 0.3},
            mtd.Sampling(1.5, top_k=3),
        ),
        (
            "self_speculative",
            {"skip_attention": "1", "drafts": 3, "threshold": 0},
            mtd.Sampling(0.9, top_p=0.8),
        ),
        (
            "cp",
            {"tree": "chain", "acceptance": "rejection"},
            mtd.Sampling(1.2, min_p=0.1, presence_penalty=0.5),
        ),
        (
            "cp",
            {"tree": "2x2x1", "acceptance": "rejection"},
            mtd.Sampling(1.5, top_k=6, presence_penalty=0.5),
        ),
        (
            "cp",
            {"tree": "chain", "acceptance": "rejection", **WHOLE},
            mtd.Sampling(1.2, top_k=6, frequency_penalty=0.3),
        ),
        (
            "cp",
            {"tree": "2x2x1", "acceptance": "rejection", **WHOLE},
            mtd.Sampling(1.5, top_k=6, presence_penalty=0.5),
        ),
        (
            "dmtd",
            {"cycle": 4, "lossless": True, **DMTD},
            mtd.Sampling(
                1.5,
                top_k=4,
                repetition_penalty=1.3,
                presence_penalty=0.5,
                frequency_penalty=0.4,
            ),
        ),
    ],
    ids=[
        *("self_speculative:threshold", "self_speculative", "cp", "cp:siblings"),
        *("cp:whole", "cp:whole:siblings", "dmtd"),
    ],
)
def test_tokens_are_drawn_from_the_model(
    name: str, options: dict[str, Any], sampling: mtd.Sampling
) -> None:
    model = tiny.decided(tiny.language_model(tiny.config(vocab_size=VOCAB)))
    known = _heads(model, name, WHOLE if options.keys() >= WHOLE.keys() else {})
    method = mtd.methods.make_method(name, options, known)
    found = _drawn(method, model.params, sampling)
    assert 0.1 * found.drafted < found.accepted < found.drafted  # both ways are taken, often
    exact = _exact(name, model.params, known, sampling)
    assert found.texts.keys() <= exact.keys()
    # Rare outcomes together with the rarest of the others, so that every cell expects enough.
    order = sorted(exact, key=exact.__getitem__, reverse=True)
    common = [text for text in order if exact[text] * DRAWS >= 10]
    rare = len(common) < len(order)
    common = common[:-1] if rare else common
    counts = [found.texts[text] for text in common]
    chances = [exact[text] for text in common]
    if rare:
        counts.append(DRAWS - sum(counts))
        chances.append(1 - sum(chances))
    assert len(counts) > 20
    observed = np.array(counts, np.float64)
    expected = np.array(chances) / sum(chances) * DRAWS
    # How many rows have which prompt is no chance: one degree of freedom less.
    free = len(PROMPTS) - 1
    assert scipy.stats.chisquare(observed, expected, ddof=free).pvalue > ALPHA
