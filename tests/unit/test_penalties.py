from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mtd_jax.decoding.penalties import History, penalized
from mtd_jax.decoding.sampling import Sampling, SamplingRows
from mtd_jax.decoding.tree import TokenTree

VOCAB, CAPACITY = 9, 16
TREE = TokenTree((0, 0, 1, 1, 2, 3))
REQUESTS = [
    Sampling(),
    Sampling(repetition_penalty=1.3),
    Sampling(repetition_penalty=0.5),
    Sampling(presence_penalty=0.7),
    Sampling(frequency_penalty=0.4),
    Sampling(
        1.0, 3, 0.9, 0.1, repetition_penalty=2.0, presence_penalty=-1.0, frequency_penalty=-0.3
    ),
    Sampling(repetition_penalty=1.1, presence_penalty=0.2, frequency_penalty=0.2),
]
BATCH = len(REQUESTS)
_jitted = jax.jit(penalized)


def _slow(
    logits: np.ndarray, request: Sampling, prompt: list[int], answer: list[int]
) -> np.ndarray:
    """One node: the penalties of a text that was decoded one token at a time."""
    out = logits.astype(np.float64)
    for token in set(prompt + answer):
        factor = request.repetition_penalty
        out[token] = out[token] / factor if out[token] > 0 else out[token] * factor
    for token in answer:
        out[token] -= request.frequency_penalty
    for token in set(answer):
        out[token] -= request.presence_penalty
    return out


def _history(rng: np.random.Generator) -> History:
    length = rng.integers(1, CAPACITY + 1, size=BATCH)
    prompt = np.array([rng.integers(1, n + 1) for n in length])
    text = rng.integers(VOCAB, size=(BATCH, CAPACITY))
    # What lies behind the text is not defined: whatever it is, it counts for nothing.
    behind = rng.integers(-3, VOCAB + 3, size=text.shape)
    text = np.where(np.arange(CAPACITY)[None, :] < length[:, None], text, behind)
    return History(*(jnp.asarray(x, jnp.int32) for x in (text, length, prompt)))


def _split(history: History, row: int) -> tuple[list[int], list[int]]:
    text = np.asarray(history.text)[row, : int(history.length[row])].tolist()
    prompt = int(history.prompt[row])
    return text[:prompt], text[prompt:]


def _logits(rng: np.random.Generator, nodes: int) -> np.ndarray:
    return np.asarray(rng.normal(size=(BATCH, nodes, VOCAB)) * 4, np.float32)


def _ways(drafts: np.ndarray) -> np.ndarray:
    """[B, M, depth] drafts on the way to each node, -1 behind them."""
    ways = np.full((BATCH, TREE.size, TREE.max_depth), -1, np.int32)
    for node in range(TREE.size):
        nodes = [n for n in range(1, TREE.size) if TREE.ancestors[node, n]]
        ways[:, node, : len(nodes)] = drafts[:, nodes]
    return ways


@settings(max_examples=60)
@given(st.integers(0, 2**32 - 1))
def test_every_node_is_penalised_for_its_own_text(seed: int) -> None:
    rng = np.random.default_rng(seed)
    history, logits = _history(rng), _logits(rng, TREE.size)
    drafts = rng.integers(-1, VOCAB, size=(BATCH, TREE.size)).astype(np.int32)
    ways = _ways(drafts)
    got = _jitted(jnp.asarray(logits), SamplingRows.of(REQUESTS), history, drafts=jnp.asarray(ways))
    for row, request in enumerate(REQUESTS):
        prompt, answer = _split(history, row)
        for node in range(TREE.size):
            way = [int(token) for token in ways[row, node] if token >= 0]
            expected = _slow(logits[row, node], request, prompt, answer + way)
            np.testing.assert_allclose(got[row, node], expected, rtol=1e-5, atol=1e-5)


@settings(max_examples=30)
@given(st.integers(0, 2**32 - 1))
def test_without_drafts_the_text_alone_counts(seed: int) -> None:
    rng = np.random.default_rng(seed)
    history, logits = _history(rng), _logits(rng, 1)
    rows = SamplingRows.of(REQUESTS)
    got = np.asarray(_jitted(jnp.asarray(logits), rows, history))
    for row, request in enumerate(REQUESTS):
        expected = _slow(logits[row, 0], request, *_split(history, row))
        np.testing.assert_allclose(got[row, 0], expected, rtol=1e-5, atol=1e-5)
    none = jnp.full((BATCH, 1, 3), -1, jnp.int32)
    np.testing.assert_array_equal(_jitted(jnp.asarray(logits), rows, history, drafts=none), got)


def test_an_accepted_draft_weighs_what_a_token_of_the_text_does() -> None:
    """A node's penalties are those of the root once its way has become text."""
    rng = np.random.default_rng(3)
    text = np.array([[4, 1, 4, 2, 0, 0, 0, 0]] * BATCH, np.int32)
    prompt = jnp.full(BATCH, 2, jnp.int32)
    logits = jnp.asarray(_logits(rng, 1))
    rows = SamplingRows.of(REQUESTS)
    way = [4, 7, 7]
    before = History(jnp.asarray(text), jnp.full(BATCH, 4, jnp.int32), prompt)
    drafts = jnp.broadcast_to(jnp.asarray(way, jnp.int32)[None, None], (BATCH, 1, 3))
    text[:, 4:7] = way
    after = History(jnp.asarray(text), jnp.full(BATCH, 7, jnp.int32), prompt)
    np.testing.assert_array_equal(
        _jitted(logits, rows, before, drafts=drafts), _jitted(logits, rows, after)
    )


@pytest.mark.parametrize("beside_others", [False, True])
def test_who_asks_for_no_penalty_gets_the_same_bits(beside_others: bool) -> None:
    """Also beside rows that ask, and with infinities and the smallest numbers."""
    rng = np.random.default_rng(1)
    logits = _logits(rng, TREE.size)
    tiny = float(np.finfo(np.float32).tiny)
    logits[:, :, :5] = np.array([-np.inf, 0.0, tiny, -1e30, 3e38], np.float32)
    requests = [Sampling(0.7, top_k=3, seed=row) for row in range(BATCH)]
    if beside_others:
        requests[1:] = REQUESTS[1:]
    ways = _ways(rng.integers(-1, VOCAB, size=(BATCH, TREE.size)).astype(np.int32))
    got = _jitted(
        jnp.asarray(logits), SamplingRows.of(requests), _history(rng), drafts=jnp.asarray(ways)
    )
    count = 1 if beside_others else BATCH
    np.testing.assert_array_equal(
        np.asarray(got)[:count].view(np.uint32), logits[:count].view(np.uint32)
    )


def test_a_token_without_chance_stays_without() -> None:
    history = History(jnp.array([[0, 1, 2]], jnp.int32), jnp.array([3], jnp.int32), jnp.array([1]))
    logits = jnp.array([[[-jnp.inf, 1.0, -jnp.inf, 2.0]]], jnp.float32)
    asked = Sampling(repetition_penalty=0.5, presence_penalty=-2.0, frequency_penalty=-2.0)
    got = penalized(logits, SamplingRows.of([asked]), history)
    np.testing.assert_array_equal(got[0, 0], np.array([-np.inf, 6.0, -np.inf, 2.0], np.float32))
