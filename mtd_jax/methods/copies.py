"""Drafts copied from the text, for methods whose heads draft too: every row takes what brings more.

Heads guess what a text would say; where it repeats itself, its own words are better drafts, and
longer ones. The matches are `ngram`'s (ANPD, arXiv 2404.08698), and so is the chance that each is
believed to be right. A step has one number of rows for the whole batch; which drafts stand on them,
a tree of guesses or a chain of copies, each row decides for itself.
"""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
from flax import struct

from mtd_jax.decoding.adaptive import AcceptanceRates, hoped_of_chains
from mtd_jax.decoding.method import DecodeState
from mtd_jax.decoding.row_trees import AnyTree, RowTrees, in_rows
from mtd_jax.decoding.tree import TokenTree
from mtd_jax.methods.ngram import LONGEST, NGram
from mtd_jax.typing import Array, Bool, Int, Leaf


class Copies(struct.PyTreeNode):
    """What could be copied in a step."""

    drafts: Leaf
    """[B, most] int32: a chain; -1 is none."""
    kinds: Leaf
    """[B, most] int32: of match (`matching.agreement`)."""
    hoped: Leaf
    """[trees, B] float32: drafts expected to be kept with as many rows as each tree has."""

    @classmethod
    def found(
        cls, copier: NGram, rates: AcceptanceRates, state: DecodeState, sizes: tuple[int, ...]
    ) -> Copies:
        """What the text says about how it goes on."""
        drafts, kinds = copier.propose(state)
        available = jnp.sum(drafts >= 0, axis=1, dtype=jnp.int32)
        available = jnp.minimum(available, state.useful_drafts)
        return cls(drafts, kinds, hoped_of_chains(sizes, rates.of(kinds), available))

    def in_place_of(
        self,
        tree: AnyTree,
        drafts: Int[Array, "B drafts"],
        copying: Bool[Array, " B"],
    ) -> tuple[RowTrees, Int[Array, "B drafts"]]:
        """The trees, with a chain of copies of as many nodes in the rows that copy."""
        nodes = tree.size
        chain = jnp.maximum(jnp.arange(nodes, dtype=jnp.int32) - 1, 0)[None, :]
        parents = jnp.where(copying[:, None], chain, in_rows(tree).parents)
        mixed = jnp.where(copying[:, None], self.drafts[:, : nodes - 1], drafts)
        return RowTrees.hung(parents, nodes - 1), mixed

    def after(
        self,
        rates: AcceptanceRates,
        drafted: Int[Array, " B"],
        accepted: Int[Array, " B"],
        copying: Bool[Array, " B"],
    ) -> AcceptanceRates:
        """The rates behind a step that drafted and accepted so many tokens in each row."""
        return rates.after(
            self.kinds, jnp.where(copying, drafted, 0), jnp.where(copying, accepted, 0)
        )


def copier_of(sizes: tuple[int, ...]) -> NGram | None:
    """What finds copies for steps of up to so many rows; None where no step has a draft."""
    if sizes[-1] == 1:
        return None
    costs: Any = jnp.ones(2, jnp.float32)
    tree = TokenTree.chain(sizes[-1] - 1)
    return NGram(costs=costs, tree=tree, sizes=(1, tree.size), longest=LONGEST)
