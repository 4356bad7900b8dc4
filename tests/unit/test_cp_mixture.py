"""The identities of the mixture, by enumeration of every outcome of a small vocabulary."""

from __future__ import annotations

import itertools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats

from mtd_jax.methods import cp_mixture
from tests.oracle import cp_mixture as oracle

VOCAB, STEPS = 4, 3
OUTCOMES = np.array(list(itertools.product(range(VOCAB), repeat=STEPS)), np.int32)
ALPHA, DRAWS = 1e-4, 60_000


class _Mixture(NamedTuple):
    log_w: jax.Array
    """[r]"""
    log_p: jax.Array
    """[r, n, V]"""

    @property
    def plain(self) -> tuple[np.ndarray, np.ndarray]:
        return np.exp(np.asarray(self.log_w, np.float64)), np.exp(
            np.asarray(self.log_p, np.float64)
        )

    @property
    def found(self) -> jax.Array:
        """[outcomes, r, n]."""
        by_step = [self.log_p[:, s, OUTCOMES[:, s]].T for s in range(STEPS)]
        return jnp.stack(by_step, axis=-1)

    @property
    def joint(self) -> np.ndarray:
        """[outcomes]."""
        log_w = jnp.broadcast_to(self.log_w, (len(OUTCOMES), self.log_w.shape[0]))
        return np.asarray(_joint(log_w, self.found))


def _steps(log_w: jax.Array, found: jax.Array) -> tuple[jax.Array, jax.Array]:
    """log q [..., n] of every step and log pi [..., r, n + 1], step by step as in training."""
    log_q, log_pi = [], [log_w]
    for step in range(found.shape[-1]):
        own, after = cp_mixture.told(log_pi[-1], found[..., step])
        log_q.append(own)
        log_pi.append(after)
    return jnp.stack(log_q, axis=-1), jnp.stack(log_pi, axis=-1)


def _joint(log_w: jax.Array, found: jax.Array) -> jax.Array:
    return _steps(log_w, found)[0].sum(axis=-1)


def _drawn(log_w: jax.Array, log_p: jax.Array, keys: jax.Array) -> jax.Array:
    """x_1 .. x_n one after the other (ancestral sampling)."""
    log_pi, tokens = log_w, []
    for step in range(STEPS):
        log_q = cp_mixture.mixed(log_pi, log_p[:, :, step])
        token = jax.vmap(jax.random.categorical)(keys[:, step], log_q).astype(jnp.int32)
        log_pi = cp_mixture.seen(log_pi, log_p[:, :, step], token)
        tokens.append(token)
    return jnp.stack(tokens, axis=1)


def _mixture(rank: int, seed: int = 0, scale: float = 2.0) -> _Mixture:
    w, p = jax.random.split(jax.random.key(seed))
    return _Mixture(
        jax.nn.log_softmax(jax.random.normal(w, (rank,))),
        jax.nn.log_softmax(scale * jax.random.normal(p, (rank, STEPS, VOCAB))),
    )


@pytest.mark.parametrize("rank", [1, 2, 5])
def test_it_is_a_distribution_and_the_oracles(rank: int) -> None:
    found = _mixture(rank)
    np.testing.assert_allclose(np.exp(found.joint).sum(), 1.0, rtol=1e-6)
    expected = oracle.table(*found.plain)[tuple(OUTCOMES.T)]
    np.testing.assert_allclose(np.exp(found.joint), expected, rtol=1e-5)


@pytest.mark.parametrize("rank", [1, 4])
def test_the_chain_rule_gives_the_joint(rank: int) -> None:
    found = _mixture(rank)
    log_w = jnp.broadcast_to(found.log_w, (len(OUTCOMES), rank))
    steps, log_pi = _steps(log_w, found.found)
    np.testing.assert_allclose(steps.sum(axis=-1), found.joint, rtol=1e-5, atol=1e-6)
    for row, outcome in enumerate(OUTCOMES[::7]):
        now = found.log_w
        for step in range(STEPS + 1):
            before = outcome[:step].tolist()
            expected = oracle.posterior(*found.plain, before)
            np.testing.assert_allclose(np.exp(log_pi[7 * row, :, step]), expected, rtol=1e-4)
            np.testing.assert_allclose(np.exp(now), expected, rtol=1e-4)
            if step < STEPS:
                whole = np.exp(cp_mixture.mixed(now, found.log_p[:, step]))
                expected = oracle.conditional(*found.plain, before)
                np.testing.assert_allclose(whole, expected, rtol=1e-4)
                own = np.exp(steps[7 * row, step])
                np.testing.assert_allclose(own, expected[outcome[step]], rtol=1e-4)
                now = cp_mixture.seen(now, found.log_p[:, step], jnp.int32(outcome[step]))


def test_the_first_step_is_the_marginal() -> None:
    found = _mixture(3)
    marginal = oracle.table(*found.plain).sum(axis=(1, 2))
    first = np.exp(cp_mixture.mixed(found.log_w, found.log_p[:, 0]))
    np.testing.assert_allclose(first, marginal, rtol=1e-5)
    # A step that is left out, or whose factors are 1, is summed over.
    log_w = jnp.broadcast_to(found.log_w, (VOCAB, 3))
    table = found.log_p[:, 0].T[..., None]
    np.testing.assert_allclose(np.exp(_joint(log_w, table)), marginal, rtol=1e-5)
    padded = jnp.pad(table, ((0, 0), (0, 0), (0, 2)))
    np.testing.assert_allclose(np.exp(_joint(log_w, padded)), marginal, rtol=1e-5)


def test_rank_one_is_independent_heads() -> None:
    found = _mixture(1)
    independent = sum(found.log_p[0, s, OUTCOMES[:, s]] for s in range(STEPS))
    np.testing.assert_array_equal(found.joint, independent)
    whole = cp_mixture.mixed(jnp.zeros(1), found.log_p[:, 1])
    np.testing.assert_array_equal(whole, found.log_p[0, 1])


def test_experts_have_no_order() -> None:
    found = _mixture(4)
    order = jnp.array([2, 0, 3, 1])
    other = _Mixture(found.log_w[order], found.log_p[order])
    np.testing.assert_allclose(other.joint, found.joint, rtol=1e-5)
    counts = jnp.ones(5, jnp.bool)
    log_w = jax.nn.log_softmax(jax.random.normal(jax.random.key(3), (5, 4)))
    balance = [float(cp_mixture.balance(x, counts)) for x in (log_w, log_w[:, order])]
    assert balance[0] == pytest.approx(balance[1], rel=1e-6)


def test_gradients_are_finite_where_weights_underflow() -> None:
    def loss(gate: jax.Array, logits: jax.Array) -> jax.Array:
        log_w = jax.nn.log_softmax(gate.astype(jnp.float32))
        log_p = jax.nn.log_softmax(logits.astype(jnp.float32))
        found = log_p[:, :, 0]
        steps = _steps(log_w, found)[0]
        usage = cp_mixture.balance(log_w[None], jnp.ones(1, jnp.bool))
        return -_joint(log_w, found) - steps.sum() + usage

    # exp(-300) is 0 in float32, let alone the product of two such factors.
    gate = jnp.array([0.0, -300.0, 250.0], jnp.bfloat16)
    logits = jnp.zeros((3, 2, 5), jnp.bfloat16).at[2, :, 0].set(-400.0).at[0, 0, 1].set(300.0)
    value, grads = jax.value_and_grad(loss, argnums=(0, 1))(gate, logits)
    assert np.isfinite(float(value))
    for leaf in grads:
        assert leaf.dtype == jnp.bfloat16
        assert jnp.isfinite(leaf).all()
        assert float(jnp.abs(leaf).max()) > 0


def test_draws_are_from_the_joint() -> None:
    found = _mixture(3, scale=1.0)
    log_w = jnp.broadcast_to(found.log_w, (DRAWS, 3))
    keys = jax.random.split(jax.random.key(9), (DRAWS, STEPS))
    log_p = jnp.broadcast_to(found.log_p, (DRAWS, *found.log_p.shape))
    drawn = np.asarray(jax.jit(_drawn)(log_w, log_p, keys))
    place = (drawn * np.array([VOCAB**2, VOCAB, 1])).sum(axis=1)
    counts = np.bincount(place, minlength=VOCAB**STEPS)
    exact = oracle.table(*found.plain).reshape(-1)
    expected = exact / exact.sum() * DRAWS
    assert expected.min() > 5
    assert scipy.stats.chisquare(counts, expected).pvalue > ALPHA


def test_balance_is_one_where_even_and_pushes_winners_down() -> None:
    even = jnp.log(jnp.array([[0.6, 0.4], [0.4, 0.6], [1.0, 1e-20]]))
    counts = jnp.array([True, True, False])
    assert float(cp_mixture.balance(even, counts)) == pytest.approx(1.0)
    one = jnp.log(jnp.array([[1 - 1e-7, 1e-7]] * 3))
    assert float(cp_mixture.balance(one, counts)) == pytest.approx(2.0)
    assert float(cp_mixture.balance(one, counts & False)) == 0.0
    gradient = jax.grad(lambda x: cp_mixture.balance(jax.nn.log_softmax(x), counts))(one)
    assert float(gradient[0, 0]) > 0 > float(gradient[0, 1])
    assert float(cp_mixture.entropy(jnp.array([3.0, 3.0]))) == pytest.approx(np.log(2))
    assert float(cp_mixture.entropy(jnp.array([3.0, 0.0]))) == 0.0
