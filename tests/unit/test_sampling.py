from __future__ import annotations

import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from mtd_jax.decoding.sampling import (
    Sampling,
    SamplingRows,
    drafting_rows,
    log_probabilities,
    position_keys,
    sample,
)
from mtd_jax.errors import InputError
from tests.oracle import sampling as oracle

CASES = [
    Sampling(t, k, p, m)
    for t, k, p, m in itertools.product(
        (0.0, 0.3, 1.0, 2.5), (0, 1, 3, 50), (1.0, 0.9, 0.4), (0.0, 0.2)
    )
]


def test_filters_equal_their_definitions() -> None:
    logits = jax.random.normal(jax.random.key(1), (len(CASES), 11)) * 2
    got = np.exp(log_probabilities(logits, SamplingRows.of(CASES)))
    for row, case, p in zip(np.asarray(logits), CASES, got, strict=True):
        expected = oracle.probabilities(row, case.temperature, case.top_k, case.top_p, case.min_p)
        np.testing.assert_allclose(p, expected, atol=2e-6, err_msg=str(case))


def test_draws_follow_the_distribution() -> None:
    """Chi-square at alpha 1e-4 over 50,000 draws, a fresh position each."""
    draws, vocab = 50_000, 7
    for case in (Sampling(1.0), Sampling(0.7, top_k=4), Sampling(1.3, top_p=0.8, min_p=0.05)):
        logits = jax.random.normal(jax.random.key(5), (vocab,))
        rows = SamplingRows.of([case] * 1)
        position = jnp.arange(draws, dtype=jnp.int32)

        def one(p: jax.Array, rows: SamplingRows = rows, logits: jax.Array = logits) -> jax.Array:
            return sample(logits[None], rows, p[None])[0]

        tokens = np.asarray(jax.lax.map(one, position, batch_size=500))
        expected = np.exp(np.asarray(log_probabilities(logits[None], rows)[0], np.float64))
        expected /= expected.sum()
        counts = np.bincount(tokens, minlength=vocab)
        possible = expected > 0
        assert counts[~possible].sum() == 0
        _, p_value = stats.chisquare(counts[possible], expected[possible] * draws)
        assert p_value > 1e-4, (case, p_value)


def test_a_tiny_temperature_is_nearly_greedy() -> None:
    logits = jax.random.normal(jax.random.key(3), (1, 50)) * 20
    for temperature in (1e-3, 1e-10, 1e-38):
        rows = SamplingRows.of([Sampling(temperature, top_p=0.9)])
        assert int(sample(logits, rows, jnp.zeros(1, jnp.int32))[0]) == int(jnp.argmax(logits))
        assert not np.isnan(np.asarray(log_probabilities(logits, rows))).any()


def test_a_top_p_that_vanishes_keeps_the_best() -> None:
    logits = jax.random.normal(jax.random.key(3), (1, 50))
    drawn = sample(logits, SamplingRows.of([Sampling(1.0, top_p=1e-40)]), jnp.zeros(1, jnp.int32))
    assert int(drawn[0]) == int(jnp.argmax(logits))


def test_a_row_draws_alike_in_any_batch() -> None:
    logits = jax.random.normal(jax.random.key(2), (4, 50))
    cases = [Sampling(1.0, seed=s) for s in (0, 1, 2**40, 2**63 - 1)]
    position = jnp.array([3, 9, 3, 100], jnp.int32)
    together = sample(logits, SamplingRows.of(cases), position)
    for i, case in enumerate(cases):
        alone = sample(logits[i : i + 1], SamplingRows.of([case]), position[i : i + 1])
        assert int(alone[0]) == int(together[i])


def test_greedy_rows_stay_greedy_beside_sampled_ones() -> None:
    logits = jax.random.normal(jax.random.key(2), (2, 50))
    rows = SamplingRows.of([Sampling(), Sampling(5.0)])
    tokens = [int(sample(logits, rows, jnp.full(2, p, jnp.int32))[0]) for p in range(20)]
    assert set(tokens) == {int(jnp.argmax(logits[0]))}


def test_seed_and_position_change_the_draw() -> None:
    logits = jnp.zeros((1, 1000))
    drawn = {
        int(sample(logits, SamplingRows.of([Sampling(1.0, seed=s)]), jnp.array([p], jnp.int32))[0])
        for s in range(4)
        for p in range(4)
    }
    assert len(drawn) > 12


@pytest.mark.parametrize(
    "values",
    [
        {"temperature": -0.1},
        {"temperature": math.nan},
        {"temperature": math.inf},
        {"top_p": 0.0},
        {"top_p": 1.5},
        {"top_p": math.nan},
        {"min_p": -1.0},
        {"min_p": 1.1},
        {"top_k": -1},
        {"seed": -1},
        {"seed": 2**63},
    ],
)
def test_bad_values_are_refused_by_name(values: dict[str, float]) -> None:
    with pytest.raises(InputError, match=next(iter(values))):
        Sampling(**values)  # type: ignore[arg-type]


def test_drafts_of_every_step_have_noise_of_their_own() -> None:
    rows = SamplingRows.of([Sampling(1.0, seed=seed) for seed in (1, 2)])
    positions = jnp.arange(12, dtype=jnp.int32)[None, :].repeat(2, axis=0)
    seen = [position_keys(rows, positions)]
    for length in (1, 2, 7):
        lengths = jnp.full(2, length, jnp.int32)
        seen.append(position_keys(drafting_rows(rows, lengths), positions))
    keys = np.concatenate([np.asarray(keys).reshape(-1, 2) for keys in seen])
    assert len(np.unique(keys, axis=0)) == len(keys)
