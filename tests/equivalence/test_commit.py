"""What a tree leaves in the cache is what reading the accepted text afresh leaves there."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mtd_jax.decoding.row_trees import in_rows
from mtd_jax.decoding.tree import TokenTree
from mtd_jax.transformer.cache import KVCache
from mtd_jax.transformer.model import Parameters, extend, unembed
from tests.support import tiny

ROWS = 3
NODES = 7
"""Of every tree, so that only the step itself is compiled for each of them."""
CAPACITY = 48
PARAMS = {
    "full": tiny.params(),
    "windows": tiny.params(tiny.config(sliding_windows=(3, None, 6))),
}


@st.composite
def parents(draw: st.DrawFn) -> tuple[int, ...]:
    """Beartype draws random numbers, which a strategy must not, so tests make the tree."""
    return tuple(draw(st.integers(0, node)) for node in range(NODES - 1))


def _of_rows(values: st.SearchStrategy[int]) -> st.SearchStrategy[list[int]]:
    return st.lists(values, min_size=ROWS, max_size=ROWS)


@functools.partial(jax.jit, static_argnames="tree")
def _step(
    params: Parameters,
    cache: KVCache,
    tokens: jax.Array,
    tree: TokenTree | None,
    active: jax.Array,
) -> tuple[jax.Array, KVCache]:
    """None: a chain as the engine runs it, whose rows see all those before them."""
    ancestors = None if tree is None else in_rows(tree).ancestors
    x, cache = extend(params, cache, tokens, ancestors=ancestors, active=active)
    return unembed(params, x), cache


_commit = jax.jit(KVCache.commit)


@jax.jit
def _fresh(params: Parameters, tokens: jax.Array, lengths: jax.Array) -> tuple[jax.Array, KVCache]:
    cache = KVCache.empty(params.config, tokens.shape[0], CAPACITY, jnp.float32)
    x, cache = extend(params, cache, tokens)
    last = jnp.take_along_axis(x, lengths[:, None, None] - 1, axis=1)
    return unembed(params, last)[:, 0], cache.commit(lengths)


def _read(params: Parameters, texts: list[list[int]]) -> tuple[jax.Array, KVCache]:
    """Logits [B, V] of what follows the texts, and the cache that they leave."""
    tokens = np.zeros((len(texts), CAPACITY - 8), np.int32)
    for i, text in enumerate(texts):
        tokens[i, : len(text)] = text
    lengths = jnp.array([len(text) for text in texts], jnp.int32)
    return _fresh(params, jnp.asarray(tokens), lengths)


def _slots(cache: KVCache, row: int) -> tuple[np.ndarray, np.ndarray]:
    """Keys and values of a row, [L, K, S, H] both."""
    return np.asarray(cache.k[:, row]).swapaxes(-1, -2), np.asarray(cache.v[:, row])


@pytest.mark.parametrize("chained", [False, True], ids=["tree", "chain"])
@pytest.mark.parametrize("kind", PARAMS)
@settings(max_examples=12)
@given(shape=parents(), lengths=_of_rows(st.integers(1, 20)), data=st.data())
def test_commits_are_a_fresh_prefill(
    kind: str, chained: bool, shape: tuple[int, ...], lengths: list[int], data: st.DataObject
) -> None:
    """Any path of any row, twice, with rows between them that are finished."""
    params, tree = PARAMS[kind], TokenTree.chain(NODES - 1) if chained else TokenTree(shape)
    given_tree = None if chained else tree
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32)))
    texts = [rng.integers(0, 97, n).tolist() for n in lengths]
    _, cache = _read(params, texts)
    for _ in range(2):
        drafts = rng.integers(0, 97, (ROWS, NODES)).astype(np.int32)
        last = np.array(data.draw(_of_rows(st.integers(0, NODES - 1))))
        active = np.array(data.draw(_of_rows(st.integers(0, 1)))) > 0
        before, committed = cache, [len(text) for text in texts]
        logits, cache = _step(params, cache, jnp.asarray(drafts), given_tree, jnp.asarray(active))
        counts = np.where(active, tree.depth[last] + 1, 0)
        # One shape for trees of any depth: the last node once more.
        paths = np.pad(tree.paths[last], [(0, 0), (0, NODES - 1 - tree.max_depth)], mode="edge")
        given_path = None if chained else jnp.asarray(paths)
        cache = _commit(cache, jnp.asarray(counts, jnp.int32), given_path)
        for row in np.flatnonzero(active).tolist():
            way = np.flatnonzero(tree.ancestors[last[row]])
            texts[row] = texts[row] + drafts[row, way].tolist()
        expected_logits, expected = _read(params, texts)
        np.testing.assert_array_equal(cache.length, expected.length)
        for row, (text, begin) in enumerate(zip(texts, committed, strict=True)):
            # Nothing changes but the slots of the tree; of rows that are not active, nothing.
            own = np.arange(begin, begin + NODES if active[row] else begin)
            for ours, theirs, fresh in zip(
                *(_slots(c, row) for c in (cache, before, expected)), strict=True
            ):
                np.testing.assert_array_equal(
                    np.delete(ours, own, axis=2), np.delete(theirs, own, axis=2)
                )
                n = len(text)
                np.testing.assert_allclose(ours[:, :, :n], fresh[:, :, :n], rtol=1e-4, atol=1e-4)
            # The last node predicts what its own text predicts.
            if active[row]:
                ours = logits[row, last[row]]
                np.testing.assert_allclose(ours, expected_logits[row], rtol=1e-3, atol=1e-3)


def test_rows_at_the_end_of_the_cache_are_not_clamped() -> None:
    """Slots that do not exist are dropped: nothing that is committed changes."""
    params = PARAMS["full"]
    _, full = _read(params, [[3] * (CAPACITY - 10)])
    end = CAPACITY - 3  # three slots are left
    full = full.replace(length=full.length + 7)
    tree = TokenTree.chain(4)
    _, cache = _step(params, full, jnp.ones((1, 5), jnp.int32), tree, jnp.ones(1, jnp.bool))
    np.testing.assert_array_equal(cache.k[..., :end], full.k[..., :end])
    np.testing.assert_array_equal(cache.v[..., :end, :], full.v[..., :end, :])
    after = cache.commit(jnp.array([5], jnp.int32), jnp.asarray(tree.paths[4:5]))
    np.testing.assert_array_equal(after.k[..., :end], full.k[..., :end])
    np.testing.assert_array_equal(after.v[..., :end, :], full.v[..., :end, :])
