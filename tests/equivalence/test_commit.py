"""What a tree leaves in the cache is what reading the accepted text afresh leaves there."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mtd_jax.decoding.tree import TokenTree
from mtd_jax.transformer.cache import KVCache
from mtd_jax.transformer.model import Parameters, extend, unembed
from tests.support import tiny

TREES = (
    TokenTree.chain(4),
    TokenTree.branching(3, 2),
    TokenTree((0, 0, 1, 3, 2, 3, 0)),
)
LENGTHS = (5, 11, 1)
CAPACITY = 32
PARAMS = {
    "full": tiny.params(),
    "windows": tiny.params(tiny.config(sliding_windows=(3, None, 6))),
}


@functools.partial(jax.jit, static_argnames="tree")
def _step(
    params: Parameters, cache: KVCache, tokens: jax.Array, tree: TokenTree, active: jax.Array
) -> tuple[jax.Array, KVCache]:
    x, cache = extend(params, cache, tokens, ancestors=tree.ancestors, active=active)
    return unembed(params, x), cache


_fresh = jax.jit(extend)


def _read(params: Parameters, texts: list[list[int]]) -> KVCache:
    tokens = np.zeros((len(texts), CAPACITY - 8), np.int32)
    for i, text in enumerate(texts):
        tokens[i, : len(text)] = text
    cache = KVCache.empty(params.config, len(texts), CAPACITY, jnp.float32)
    _, cache = _fresh(params, cache, jnp.asarray(tokens))
    return cache.commit(jnp.array([len(t) for t in texts], jnp.int32))


@pytest.mark.parametrize("kind", PARAMS)
@pytest.mark.parametrize("tree", TREES, ids=lambda t: str(t.parents))
@settings(max_examples=12)
@given(data=st.data())
def test_commit_is_a_fresh_prefill(kind: str, tree: TokenTree, data: st.DataObject) -> None:
    """Any path of any row, finished rows between them, and the next logits agree too."""
    params = PARAMS[kind]
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32)))
    texts = [rng.integers(0, 97, n).tolist() for n in LENGTHS]
    drafts = rng.integers(0, 97, (len(texts), tree.size)).astype(np.int32)
    last = np.array([data.draw(st.integers(0, tree.size - 1)) for _ in texts])
    active = np.array([data.draw(st.booleans()) for _ in texts])
    before = _read(params, texts)
    logits, cache = _step(params, before, jnp.asarray(drafts), tree, jnp.asarray(active))

    paths = jnp.asarray(tree.paths[last])
    counts = np.where(active, tree.depth[last] + 1, 0)
    cache = cache.commit(jnp.asarray(counts, jnp.int32), paths)
    ways = [
        [n for n in range(tree.size) if tree.ancestors[node, n]] if on else []
        for node, on in zip(last, active, strict=True)
    ]
    accepted = [
        text + drafts[i, way].tolist()
        for i, (text, way) in enumerate(zip(texts, ways, strict=True))
    ]
    expected = _read(params, accepted)
    np.testing.assert_array_equal(cache.length, expected.length)
    for row, text in enumerate(accepted):
        n = len(text)
        for ours, fresh in (
            (cache.k[:, row, :, :, :n], expected.k[:, row, :, :, :n]),
            (cache.v[:, row, :, :n], expected.v[:, row, :, :n]),
        ):
            np.testing.assert_allclose(ours, fresh, rtol=1e-4, atol=1e-4)
    # Every node of an active row predicts what its own text predicts.
    for row, (text, way) in enumerate(zip(texts, ways, strict=True)):
        if way:
            whole = jnp.asarray([text + drafts[row, way].tolist()], jnp.int32)
            empty = KVCache.empty(params.config, 1, whole.shape[1], jnp.float32)
            x, _ = extend(params, empty, whole)
            np.testing.assert_allclose(
                logits[row, way[-1]], unembed(params, x)[0, -1], rtol=1e-3, atol=1e-3
            )


def test_rows_at_the_end_of_the_cache_are_not_clamped() -> None:
    """Slots that do not exist are dropped: nothing that is committed changes."""
    params = PARAMS["full"]
    text = [[3] * 22]
    full = _read(params, text)
    full = full.replace(length=full.length + 7)  # three slots are left
    tree = TokenTree.chain(4)
    _, cache = _step(params, full, jnp.ones((1, 5), jnp.int32), tree, jnp.ones(1, jnp.bool))
    np.testing.assert_array_equal(cache.k[..., :29], full.k[..., :29])
    np.testing.assert_array_equal(cache.v[..., :29, :], full.v[..., :29, :])
    after = cache.commit(jnp.array([5], jnp.int32), jnp.asarray(TREES[0].paths[4:5]))
    np.testing.assert_array_equal(after.k[..., :29], full.k[..., :29])
