"""Trees of a shape a row are, row by row, what a `TokenTree` of that shape is."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from mtd_jax.decoding import verify
from mtd_jax.decoding.row_trees import RowTrees, in_rows
from mtd_jax.decoding.tree import TokenTree
from mtd_jax.transformer import masks
from tests.oracle import verify as oracle

NODES, ROWS, CAPACITY = 7, 3, 12


@st.composite
def shapes(draw: st.DrawFn) -> tuple[int, ...]:
    """Parents of nodes 1, 2, ..."""
    return tuple(draw(st.integers(0, node)) for node in range(NODES - 1))


several = st.lists(shapes(), min_size=ROWS, max_size=ROWS)


def _hung(parents: list[tuple[int, ...]], max_depth: int = NODES - 1) -> RowTrees:
    return RowTrees.hung(jnp.asarray([(0, *p) for p in parents], jnp.int32), max_depth)


@settings(max_examples=40)
@given(several)
def test_each_row_is_the_static_tree(parents: list[tuple[int, ...]]) -> None:
    trees = _hung(parents)
    assert (trees.size, trees.max_depth) == (NODES, NODES - 1)
    for row, shape in enumerate(parents):
        tree = TokenTree(shape)
        np.testing.assert_array_equal(trees.depth[row], tree.depth)
        np.testing.assert_array_equal(trees.ancestors[row], tree.ancestors)
        behind = [(0, 0), (0, NODES - 1 - tree.max_depth)]
        np.testing.assert_array_equal(trees.paths[row], np.pad(tree.paths, behind, mode="edge"))
        same = in_rows(tree)
        for name in ("parents", "depth", "ancestors"):
            np.testing.assert_array_equal(getattr(same, name)[0], getattr(trees, name)[row])
        np.testing.assert_array_equal(same.paths[0], tree.paths)


@settings(max_examples=40)
@given(several, st.integers(0, 2**32 - 1))
def test_each_row_is_walked_by_itself(parents: list[tuple[int, ...]], seed: int) -> None:
    rng = np.random.default_rng(seed)
    # Different tokens everywhere, so that siblings differ; -1 is none.
    drafts = np.stack([rng.permutation(NODES) - 1 for _ in parents]).astype(np.int32)
    drawn = rng.integers(0, 3, (ROWS, NODES)).astype(np.int32)
    for row, shape in enumerate(parents):
        for node in range(NODES):
            wanted = [c for c in oracle.children(shape, node) if drafts[row, c] >= 0]
            if wanted and rng.random() < 0.8:
                drawn[row, node] = drafts[row, rng.choice(wanted)]
    verdict = verify.walk(_hung(parents), jnp.asarray(drafts), jnp.asarray(drawn))
    for row, shape in enumerate(parents):
        path, tokens = oracle.walk(shape, drafts[row].tolist(), drawn[row].tolist())
        kept = int(verdict.accepted[row])
        assert verdict.path[row, : kept + 1].tolist() == path
        assert set(verdict.path[row, kept:].tolist()) == {path[-1]}
        assert verdict.tokens[row, : kept + 1].tolist() == tokens


@settings(max_examples=25)
@given(several, st.lists(st.integers(0, CAPACITY), min_size=ROWS, max_size=ROWS))
def test_each_row_has_its_mask(parents: list[tuple[int, ...]], committed: list[int]) -> None:
    """Also where the tree reaches beyond the last slot."""
    lengths = jnp.asarray(committed, jnp.int32)
    found = masks.tree(lengths, _hung(parents).ancestors, CAPACITY)
    for row, shape in enumerate(parents):
        own = in_rows(TokenTree(shape)).ancestors
        alone = masks.tree(lengths[row : row + 1], own, CAPACITY)
        np.testing.assert_array_equal(found[row], alone[0])
