"""The gradient of the CP loss against that of one big expression that JAX differentiates itself."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mtd_jax import methods
from mtd_jax.methods.cp_heads import CPSpec
from mtd_jax.methods.cp_weights import CPWeights
from mtd_jax.training.whole import WholeTraining
from mtd_jax.transformer.model import Parameters, normed, project
from mtd_jax.transformer.packed import Packed, packed_hidden
from tests.support import heads, tiny

OPTIONS: list[dict[str, Any]] = [
    {"loss": "joint", "rank": 3, "tokens": 3, "factor": 8, "balance": 0.1},
    {"loss": "joint", "rank": 2, "tokens": 2, "own_output": True},
    {"rank": 2, "tokens": 3, "factor": 0, "beta": 0.7, "gamma": 0.5, "balance": 0.05},
    {"loss": "joint", "rank": 3, "tokens": 4, "factor": 0, "balance": 0.1, "trunk": "trained"},
    {"loss": "joint", "rank": 2, "tokens": 3, "own_output": True, "trunk": "trained"},
]
TEXTS = [[5, 6, 7, 8, 9, 6, 5], [11, 12, 13], [3, 4, 3, 4], [9] * 6]
CHUNK = 5


def _tables(weights: CPWeights, params: Parameters, e: jax.Array) -> jax.Array:
    """[B, T, r, n, V] log-probabilities, all at once."""
    if weights.output is not None:
        return jax.nn.log_softmax(jnp.einsum("btd,rndv->btrnv", e, weights.output))
    moved = jnp.einsum("btd,drnk->btrnk", e, weights.down)
    if weights.up is not None:
        moved = jnp.einsum("btrnk,rnkd->btrnd", moved, weights.up)
    return jax.nn.log_softmax(project(params, e[:, :, None, None] + moved))


def _whole(spec: CPSpec, weights: CPWeights, params: Parameters, batch: Packed) -> jax.Array:
    """Position by position, without chunks, scans or masks."""
    if spec.trunk == "frozen":
        params = jax.lax.stop_gradient(params)
    e = normed(params, packed_hidden(params, batch))
    log_w, log_p = jax.nn.log_softmax(e @ weights.gate), _tables(weights, params, e)
    base = jax.nn.log_softmax(project(params, e))
    total, rows = jnp.zeros(()), []
    for b, text in enumerate(TEXTS):
        for t in range(len(text) - 1):
            rows.append(log_w[b, t])
            log_pi = log_w[b, t]
            for s, token in enumerate(text[t + 1 : t + 1 + spec.tokens]):
                table = log_p[b, t, :, s]
                log_q = jax.nn.logsumexp(log_pi[:, None] + table, 0) - jax.nn.logsumexp(log_pi)
                log_pi = log_pi + table[:, token]
                said = base[b, t + s]
                kl = (jnp.exp(said) * (said - log_q)).sum()
                distilled = spec.beta * kl - (1 - spec.beta) * log_q[token]
                total += -log_q[token] if spec.loss == "joint" else spec.gamma**s * distilled
    w = jnp.stack(rows)
    wins = jax.nn.one_hot(w.argmax(-1), spec.rank).mean(0)
    balance = spec.rank * (wins * jnp.exp(w).mean(0)).sum()
    return total / len(rows) + spec.balance * balance


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_the_gradient_is_that_of_the_whole_expression(options: dict[str, Any]) -> None:
    model = tiny.language_model()
    spec = methods.make_spec("cp", options)
    assert isinstance(spec, CPSpec)
    batch = heads.packed(TEXTS)
    drawn = heads.random(model, "cp", **options).weights
    weights = jax.tree.map(lambda x: 0.2 * x, drawn)
    counts, params = spec.counts(batch), model.params
    trained = WholeTraining(spec, tuple(sorted(options.items())), 0, CHUNK)

    def fast(params: Parameters, weights: CPWeights) -> jax.Array:
        if spec.trunk == "trained":
            return trained.loss((params, weights), (), batch, counts, None)[0]
        return spec.training_loss(weights, params, batch, counts, chunk=CHUNK)[0]

    def slow(params: Parameters, weights: CPWeights) -> jax.Array:
        return _whole(spec, weights, params, batch)

    def taken(loss: Callable[[Parameters, CPWeights], jax.Array]) -> Any:
        return jax.jit(jax.value_and_grad(loss, argnums=(0, 1)))(params, weights)

    (a, found), (b, expected) = taken(fast), taken(slow)
    np.testing.assert_allclose(a, b, rtol=1e-5)
    for x, y in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(x, y, atol=1e-4 * float(jnp.abs(y).max()) + 1e-12)
