"""Where drafting ends, and how the threshold that ends it follows what was accepted."""

from __future__ import annotations

import itertools
from functools import cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mtd_jax import methods
from mtd_jax.decoding import draft_chain
from mtd_jax.decoding.draft_chain import draw_chain
from mtd_jax.decoding.method import DecodeState, Requests, Tally
from mtd_jax.decoding.sampling import Sampling, SamplingRows
from mtd_jax.transformer.cache import KVCache
from tests.support import tiny

VOCAB = 8
CONFIG = tiny.config(vocab_size=VOCAB)
MOST = 5
LENGTH = 3
# A drafter that looks at the newest token alone: behind t comes t + 1 with this probability, the
# other tokens share the rest. Greedy drafts behind token 0 are 1, 2, 3, 4, 5.
SURE = (0.95, 0.8, 0.5, 0.7, 0.9, 0.6, 0.4, 0.3)


@cache
def _probabilities() -> np.ndarray:
    """Of shape [newest, next]."""
    table = np.zeros((VOCAB, VOCAB))
    for newest, p in enumerate(SURE):
        table[newest] = (1 - p) / (VOCAB - 1)
        table[newest, (newest + 1) % VOCAB] = p
    return table


def _state(sampling: list[Sampling], active: list[bool], budget: list[int]) -> DecodeState:
    """Rows of text, all of them with token 0 pending."""
    batch = len(sampling)
    zeros = jnp.zeros(batch, jnp.int32)
    cache = KVCache.empty(CONFIG, batch, 16, jnp.float32)
    return DecodeState(
        cache=cache.replace(length=zeros + LENGTH),
        text=jnp.zeros((batch, 17), jnp.int32),
        prompt_length=zeros + LENGTH,
        pending=zeros,
        emitted=jnp.zeros((batch, MOST + 1), jnp.int32),
        emitted_count=zeros,
        partial=zeros,
        drafted=zeros,
        tally=Tally.empty(batch, MOST + 1),
        active=jnp.asarray(active),
        requests=Requests(
            budget=jnp.asarray(budget, jnp.int32),
            stop_ids=jnp.full(1, -1, jnp.int32),
            sampling=SamplingRows.of(sampling),
        ),
    )


@pytest.fixture
def draw(monkeypatch: pytest.MonkeyPatch) -> Any:
    """`draw_chain` with that drafter, which counts in the cache what it runs.

    Its passes in the keys, those that a row takes part in in the row's values.
    """
    logits = jnp.asarray(np.log(_probabilities()), jnp.float32)
    monkeypatch.setattr(draft_chain, "unembed", lambda params, x: x)

    def draft(cache: KVCache, tokens: jax.Array, going: jax.Array) -> tuple[jax.Array, KVCache]:
        ran = going[None, :, None, None, None].astype(jnp.float32)
        return logits[tokens], cache.replace(k=cache.k + 1, v=cache.v + ran)

    @jax.jit
    def run(state: DecodeState, limit: jax.Array, threshold: jax.Array) -> Any:
        return draw_chain(tiny.params(CONFIG), state, draft, MOST, limit, threshold)

    return run


def test_drafting_ends_behind_the_first_unsure_draft(draw: Any) -> None:
    """Each row by its own threshold; also at its limit, its budget, and where it is not active."""
    rows = [
        # threshold, limit, budget, active, drafts
        (0.0, 5, 100, True, 5),
        (0.45, 5, 100, True, 5),
        (0.55, 5, 100, True, 3),  # 0.95, 0.8, 0.5; 0.7 and 0.9 would follow
        (0.85, 5, 100, True, 2),
        (0.99, 5, 100, True, 1),
        (0.55, 2, 100, True, 2),
        (0.0, 5, 2, True, 1),
        (0.0, 5, 1, True, 0),
        (0.0, 0, 100, True, 0),
        (0.0, 5, 100, False, 0),
    ]
    threshold, limit, budget, active, expected = map(list, zip(*rows, strict=True))
    before = _state([Sampling()] * len(rows), active, budget)
    limits, thresholds = jnp.asarray(limit, jnp.int32), jnp.asarray(threshold, jnp.float32)
    state, drafts, count, log_q = draw(before, limits, thresholds)
    assert count.tolist() == expected
    for row, number in enumerate(expected):
        assert drafts[row].tolist() == [*range(1, number + 1), *[-1] * (MOST - number)]
        # What was not wanted was not drafted either.
        assert (state.cache.v[:, row] == number).all()
    np.testing.assert_array_equal(state.cache.length, before.cache.length)
    assert not log_q.any()  # no row draws: nobody asks what from


def test_no_pass_is_run_for_rows_that_are_all_done(draw: Any) -> None:
    before = _state([Sampling()] * 2, [True, True], [100, 100])
    limits = jnp.full(2, MOST, jnp.int32)
    thresholds = jnp.asarray([0.85, 0.99], jnp.float32)
    state, drafts, count, _ = draw(before, limits, thresholds)
    assert count.tolist() == [2, 1]
    assert drafts.tolist() == [[1, 2, -1, -1, -1], [1, -1, -1, -1, -1]]
    assert (state.cache.k == 2).all()


@pytest.mark.parametrize("threshold", [0.0, 0.04, 0.55])
def test_drawn_drafts_end_by_what_was_drawn(draw: Any, threshold: float) -> None:
    """By the probability of the token that was drawn, which need not be the greatest one."""
    batch = 64
    sampling = [Sampling(1.0, seed=seed) for seed in range(batch)]
    before = _state(sampling, [True] * batch, [100] * batch)
    limits = jnp.full(batch, MOST, jnp.int32)
    _, drafts, count, log_q = draw(before, limits, jnp.full(batch, threshold, jnp.float32))
    p = _probabilities()
    likeliest = 0
    for row in range(batch):
        way = [0, *drafts[row, : count[row]].tolist()]
        chances = [p[a, b] for a, b in itertools.pairwise(way)]
        unsure = [i for i, chance in enumerate(chances) if chance < threshold]
        assert unsure in ([], [len(chances) - 1])
        assert len(chances) == MOST or unsure
        assert (drafts[row, count[row] :] == -1).all()
        np.testing.assert_allclose(log_q[row, : count[row]], np.log(p[way[:-1]]), atol=1e-5)
        likeliest += all(b == a + 1 for a, b in itertools.pairwise(way))
    assert 0 < likeliest < batch
    assert (int(count.min()) < MOST) == (threshold > 0)


def _adapted(method: Any, steps: list[tuple[int, int]]) -> list[tuple[float, float]]:
    """Acceptance and threshold of one row after each step, in which (drafted, accepted) is so."""
    state = _state([Sampling()], [True], [100])
    last = jnp.zeros((1, CONFIG.hidden_size), jnp.float32)
    kept = method.kept(tiny.params(CONFIG), last, state.cache, state.requests)
    found = []
    for drafted, accepted in steps:
        one = [jnp.array([n], jnp.int32) for n in (drafted, accepted)]
        kept = method._adapted(kept, *one, jnp.zeros((1, method.sizes[-1] - 1), jnp.int32))
        found.append((float(kept.acceptance[0]), float(kept.threshold[0])))
    return found


def test_the_threshold_follows_the_acceptance() -> None:
    """Worked out by hand, beginning with 0.6 and an acceptance of 0.9, the target.

    acceptance <- 0.5 acceptance + 0.5 accepted / drafted
    threshold <- 0.9 threshold + 0.1 (threshold + 0.01), or - 0.01 where the acceptance is over 0.9
    """
    method = methods.self_speculative(skip_attention="1", drafts=4)
    steps = [(4, 4), (2, 1), (0, 0), (1, 0), (3, 3), (3, 3), (3, 3)]
    expected = [
        (0.95, 0.599),
        (0.725, 0.600),
        (0.725, 0.600),  # a step without drafts says nothing
        (0.3625, 0.601),
        (0.68125, 0.602),
        (0.840625, 0.603),
        (0.9203125, 0.602),
    ]
    np.testing.assert_allclose(_adapted(method, steps), expected, atol=1e-6)


@pytest.mark.parametrize(
    ("options", "step", "expected"),
    [
        ({"target_acceptance": 0.5}, (4, 2), (0.5, 0.601)),  # the target itself is not over it
        ({"target_acceptance": 0.5}, (4, 3), (0.625, 0.599)),
        ({"threshold": 1.0}, (4, 0), (0.45, 1.0)),
        ({"threshold": 0.0005}, (4, 4), (0.95, 0.00045)),
        ({"threshold": 0.0}, (4, 0), (0.9, 0.0)),  # never to end a draft: it stays
    ],
)
def test_targets_and_ends_of_the_range(
    options: dict[str, Any], step: tuple[int, int], expected: tuple[float, float]
) -> None:
    method = methods.self_speculative(skip_attention="1", drafts=4, **options)
    np.testing.assert_allclose(_adapted(method, [step]), [expected], atol=1e-6)


def test_steps_adapt_rows_by_their_own_drafts() -> None:
    """Through the model; a row that is not active keeps what it had, bit for bit."""
    model = tiny.decided(tiny.language_model())
    method: Any = methods.self_speculative(skip_attention="1", drafts=4, threshold=0.4)
    tokens = jnp.asarray([[3, 4, 5, 6], [9, 8, 7, 6], [11, 12, 13, 14]], jnp.int32)
    requests = Requests(
        budget=jnp.full(3, 200, jnp.int32),
        stop_ids=jnp.full(1, -1, jnp.int32),
        sampling=SamplingRows.of([Sampling()] * 3),
    )
    prefill = jax.jit(method.prefill, static_argnums=4)
    state = prefill(model.params, tokens, jnp.full(3, 4, jnp.int32), requests, 128)
    step = jax.jit(method.step)
    moves = set()
    drafted = set()
    for number in range(24):
        # The last row rests in every third step.
        before = state.replace(active=jnp.asarray([True, True, number % 3 > 0]))
        state = step(model.params, before)
        for row in range(3):
            old, new = (
                (float(x.extra.acceptance[row]), float(x.extra.threshold[row]))
                for x in (before, state)
            )
            if not before.active[row]:
                assert new == old
                assert state.emitted_count[row] == state.drafted[row] == 0
                assert state.cache.length[row] == before.cache.length[row]
                continue
            count = int(state.drafted[row])
            share = (int(state.emitted_count[row]) - 1) / count
            acceptance = 0.5 * old[0] + 0.5 * share
            move = 0.01 if acceptance <= 0.9 else -0.01
            np.testing.assert_allclose(new, (acceptance, old[1] + 0.1 * move), atol=1e-6)
            moves.add(move)
            drafted.add(count)
    assert moves == {0.01, -0.01}
    assert len(drafted) > 1
