"""Trees that every row of a batch shapes for itself: which drafts hang on which is data, not code.

A `TokenTree` is fixed when a program is compiled. Where drafts have probabilities as paths, the
likeliest paths form another tree for every text and step; only its size is static. What verifies
trees takes either, through `in_rows`.
"""

from __future__ import annotations

from typing import TypeAlias

import jax.numpy as jnp
from flax import struct

from mtd_jax.decoding.tree import TokenTree
from mtd_jax.typing import Array, Int, Leaf


class RowTrees(struct.PyTreeNode):
    """A tree of M nodes a row (or one for all rows, b = 1); fields mean what `TokenTree`'s do."""

    parents: Leaf
    """[b, M] int32; 0 for the root, which is node 0. Every other node comes behind its parent."""
    depth: Leaf
    """[b, M] int32"""
    ancestors: Leaf
    """[b, M, M] bool"""
    paths: Leaf
    """[b, M, max_depth + 1] int32"""

    @classmethod
    def hung(cls, parents: Int[Array, "b M"], max_depth: int) -> RowTrees:
        """The trees of these parents; no node may be deeper than `max_depth`."""
        batch, nodes = parents.shape
        above = [jnp.broadcast_to(jnp.arange(nodes, dtype=jnp.int32)[None, :], (batch, nodes))]
        for _ in range(max_depth):
            above.append(jnp.take_along_axis(parents, above[-1], axis=1))
        # [b, M, max_depth + 1]: a node, its parent, that one's, ... and from the root on the root.
        ups = jnp.stack(above, axis=2)
        depth = jnp.sum(ups > 0, axis=2, dtype=jnp.int32)
        ancestors = jnp.any(ups[..., None] == jnp.arange(nodes)[None, None, None, :], axis=2)
        downwards = depth[:, :, None] - jnp.arange(max_depth + 1, dtype=jnp.int32)[None, None, :]
        paths = jnp.take_along_axis(ups, jnp.maximum(downwards, 0), axis=2)
        return cls(parents=parents, depth=depth, ancestors=ancestors, paths=paths)

    @property
    def size(self) -> int:
        """M: nodes, the root included."""
        return self.parents.shape[1]

    @property
    def max_depth(self) -> int:
        """The most drafts that can be accepted at once."""
        return self.paths.shape[2] - 1

    @property
    def is_chain(self) -> bool:
        """Not known when the program is compiled."""
        return False


AnyTree: TypeAlias = TokenTree | RowTrees


def in_rows(tree: AnyTree) -> RowTrees:
    """The same for every row, where it is a static one."""
    if isinstance(tree, RowTrees):
        return tree
    return RowTrees(
        parents=jnp.asarray((0, *tree.parents), jnp.int32)[None],
        depth=jnp.asarray(tree.depth)[None],
        ancestors=jnp.asarray(tree.ancestors)[None],
        paths=jnp.asarray(tree.paths)[None],
    )
