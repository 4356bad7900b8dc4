"""What methods share that draft from the text itself: sizes, adaptation, verification."""

from __future__ import annotations

import abc
from typing import Any

import jax.numpy as jnp
from flax import struct

from mtd_jax.decoding.adaptive import AcceptanceRates, best_size, urgency
from mtd_jax.decoding.base_method import BaseMethod
from mtd_jax.decoding.method import DecodeState, Requests
from mtd_jax.decoding.speculative import Acceptance, in_place_switch, verify_drafts
from mtd_jax.decoding.tree import TokenTree
from mtd_jax.transformer.cache import KVCache
from mtd_jax.transformer.model import Parameters
from mtd_jax.typing import Array, Float, Int

_BY_LENGTH = (0.0, 0.2, 0.5, 0.55, 0.6, 0.7, 0.75)
"""How often the token behind a match of so many tokens is right: counted in 193 greedy answers of
SmolLM2-135M-Instruct to the recipes' prompts (0.23, 0.56, 0.59, 0.64, 0.71, 0.79), rounded down."""
_BELIEF = 4.0
"""Tries that they count as: a text says soon whether it repeats itself."""


class Copying(BaseMethod):
    """A method whose drafts cost next to nothing; `propose` makes them.

    Every step verifies as many of them as `sizes` and `costs` say, down to none.
    """

    costs: Any
    """[sizes] float32: what a forward pass of so many rows costs, in any unit."""
    tree: TokenTree = struct.field(pytree_node=False)
    """The drafts that are proposed; if it is a chain, a step may verify only the first of them."""
    sizes: tuple[int, ...] = struct.field(pytree_node=False)
    """Rows that a step may have, ascending from 1 to the tree's size."""
    longest: int = struct.field(pytree_node=False)
    """The longest match that is told from longer ones."""
    acceptance: Acceptance = struct.field(pytree_node=False, default="exact")
    auto: bool = struct.field(pytree_node=False, default=False)
    """Whether `costs` are to be measured and the number of drafts follows from them."""

    @property
    def lossless(self) -> bool:
        """Unless acceptance is `typical`."""
        return self.acceptance == "exact"

    @property
    def max_emit(self) -> int:
        """All drafts of a path and the bonus token."""
        return self.tree.max_depth + 1

    @property
    def rows_per_step(self) -> int:
        """Every node takes a cache slot."""
        return self.tree.size

    @abc.abstractmethod
    def propose(self, state: DecodeState) -> tuple[Int[Array, "B drafts"], Int[Array, " B"]]:
        """Drafts for nodes 1, 2, ... (-1: none), and the length of their match: 0..longest."""

    def kept(
        self,
        params: Parameters,
        last: Float[Array, "B D"],
        cache: KVCache,
        requests: Requests,
    ) -> AcceptanceRates:
        """How often drafts of each length of match were right."""
        known = (*_BY_LENGTH, *[_BY_LENGTH[-1]] * self.longest)
        return AcceptanceRates.empty(last.shape[0], known[: self.longest + 1], _BELIEF)

    def step(self, params: Parameters, state: DecodeState) -> DecodeState:
        """Copies drafts out of the text and verifies the number of them that pays."""
        drafts, kind = self.propose(state)
        available = jnp.sum(drafts >= 0, axis=1, dtype=jnp.int32)
        available = jnp.minimum(available, state.useful_drafts)
        rates: AcceptanceRates = state.extra
        rate = rates.of(kind)
        weight = urgency(state.active, state.requests.budget)
        size = best_size(self.sizes, self.costs, rate, available, weight)

        def with_rows(rows: int) -> Any:
            tree = self.tree if rows == self.tree.size else TokenTree.chain(rows - 1)

            def verified(state: DecodeState) -> DecodeState:
                some, rule = drafts[:, : rows - 1], self.acceptance
                return verify_drafts(params, state, tree, some, acceptance=rule)[0]

            return verified

        state = in_place_switch(size, [with_rows(rows) for rows in self.sizes], state)
        accepted = jnp.maximum(state.emitted_count - 1, 0)
        rates = rates.after(kind, state.drafted, accepted)
        return state.replace(extra=rates)
