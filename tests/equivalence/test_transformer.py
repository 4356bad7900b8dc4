"""Every fast walk over the layers equals the float64 book version."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mtd_jax.transformer import block, masks, model
from mtd_jax.transformer.cache import KVCache
from mtd_jax.transformer.stack import Remat, rows_at, train_stack
from tests.oracle import transformer as oracle
from tests.support import tiny

extend, forward = jax.jit(model.extend), jax.jit(model.forward)

VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "mha": {"num_kv_heads": 4},
    "mqa": {"num_kv_heads": 1},
    "tied": {"tie_embeddings": True},
    "biases": {"qkv_bias": True, "attention_out_bias": True, "mlp_bias": True},
    "qk_norm": {"qk_norm": True},
    "window": {"sliding_windows": (4, None, 7)},
    "softcaps": {"attention_logit_softcap": 3.0, "final_logit_softcap": 2.0},
}


def _randomized(params: model.Parameters) -> model.Parameters:
    """Biases and norms away from their zeros and ones, so that leaving one out shows."""
    leaves, structure = jax.tree.flatten(params)
    keys = jax.random.split(jax.random.key(7), len(leaves))
    noisy = [w + 0.1 * jax.random.normal(k, w.shape) for w, k in zip(leaves, keys, strict=True)]
    return jax.tree.unflatten(structure, noisy)


@pytest.mark.parametrize("name", VARIANTS)
def test_forward_and_extend_equal_the_oracle(name: str) -> None:
    params = _randomized(tiny.params(tiny.config(**VARIANTS[name])))
    tokens = jax.random.randint(jax.random.key(1), (2, 13), 0, 97)
    expected = np.stack([oracle.logits(params, row.tolist()) for row in tokens])
    np.testing.assert_allclose(forward(params, tokens), expected, atol=2e-4)
    prepared = model.prepare_for_decoding(params)
    for layout in (params, prepared):
        cache = KVCache.empty(params.config, 2, 128, jnp.float32)
        got = []
        for start, stop in ((0, 5), (5, 6), (6, 13)):
            x, cache = extend(layout, cache, tokens[:, start:stop])
            cache = cache.replace(length=cache.length + stop - start)
            got.append(model.unembed(layout, x))
        np.testing.assert_allclose(jnp.concatenate(got, axis=1), expected, atol=2e-4)


def test_rollback_leaves_no_trace() -> None:
    params = tiny.params()
    tokens = jax.random.randint(jax.random.key(1), (1, 12), 0, 97)
    _, cache = extend(params, KVCache.empty(params.config, 1, 128, jnp.float32), tokens)
    cache = cache.replace(length=jnp.array([4], jnp.int32))
    x, _ = extend(params, cache, tokens[:, 4:7])
    got, expected = model.unembed(params, x), forward(params, tokens[:, :7])[:, 4:]
    np.testing.assert_allclose(got, expected, atol=1e-5)


def test_inactive_rows_write_nothing() -> None:
    params = tiny.params()
    tokens = jnp.ones((2, 3), jnp.int32)
    empty = KVCache.empty(params.config, 2, 128, jnp.float32)
    _, cache = extend(params, empty, tokens, active=jnp.array([True, False]))
    assert cache.k[:, 0].any()
    assert not cache.k[:, 1].any()
    assert not cache.v[:, 1].any()


def test_unstacked_layers_are_the_stack() -> None:
    params = tiny.params()
    blocks: Any = params.blocks
    layers = block.unstack(blocks)
    for i, layer in enumerate(layers):
        jax.tree.map(lambda a, b, i=i: np.testing.assert_array_equal(a, b[i]), layer, params.blocks)


def _stack_inputs(params: model.Parameters) -> dict[str, Any]:
    tokens = jax.random.randint(jax.random.key(1), (2, 6), 0, 97)
    positions = jnp.broadcast_to(jnp.arange(6, dtype=jnp.int32), (2, 6))
    mask = masks.causal(positions, positions)
    rows = rows_at(params.config, positions, positions, mask, positions + 1)
    return {"x": model.embed(params, tokens), "rows": rows}


def test_taps_are_the_inputs_of_their_layers() -> None:
    params = tiny.params()
    inputs = _stack_inputs(params)
    _, tapped = train_stack(params.config, params.blocks, taps=(0, 2), **inputs)
    np.testing.assert_array_equal(tapped[0], inputs["x"])
    two = jax.tree.map(lambda w: w[:2], params.blocks)
    shorter = tiny.config(num_layers=2)
    after_two, _ = train_stack(shorter, two, **inputs)
    np.testing.assert_allclose(tapped[1], after_two, atol=1e-6)


def test_inject_changes_the_input_of_its_layer_only() -> None:
    params = tiny.params()
    inputs = _stack_inputs(params)
    _, tapped = train_stack(
        params.config,
        params.blocks,
        taps=(1, 2),
        inject=lambda layer, x, _: jnp.where(layer == 2, jnp.zeros_like(x), x),
        **inputs,
    )
    _, plain = train_stack(params.config, params.blocks, taps=(1, 2), **inputs)
    np.testing.assert_array_equal(tapped[0], plain[0])
    assert not tapped[1].any()
    assert plain[1].any()


def test_remat_and_unstacked_give_the_same_gradients() -> None:
    params = tiny.params()
    inputs = _stack_inputs(params)

    def loss(blocks: Any, remat: Remat) -> jax.Array:
        x, _ = train_stack(params.config, blocks, remat=remat, **inputs)
        return jnp.sum(jnp.square(x))

    plain = jax.grad(loss)(params.blocks, "none")
    remat = jax.grad(loss)(params.blocks, "layer")
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-3), plain, remat)
    blocks: Any = params.blocks
    layers = block.unstack(blocks)
    split = jax.grad(loss)(layers, "none")
    for i, layer in enumerate(split):
        jax.tree.map(
            lambda a, b, i=i: np.testing.assert_allclose(a, b[i], rtol=1e-4, atol=1e-3),
            layer,
            plain,
        )


def test_the_gradient_of_a_frequent_token_does_not_saturate() -> None:
    """4096 times a gradient of one: bfloat16 additions would stop at 256."""
    params = tiny.params()
    params = params.replace(embedding=params.embedding.astype(jnp.bfloat16))
    tokens = jnp.full((1, 4096), 5, jnp.int32)

    def total(table: jax.Array) -> jax.Array:
        x = model.embed(params.replace(embedding=table), tokens)
        return x.astype(jnp.float32).sum()

    gradient = jax.grad(total)(params.embedding)
    assert gradient.dtype == jnp.bfloat16
    np.testing.assert_array_equal(gradient[5].astype(jnp.float32), 4096.0)
    assert not gradient[:5].any()
