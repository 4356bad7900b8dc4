"""What methods share that draft from the text itself: sizes, adaptation, verification."""

from __future__ import annotations

import abc
import itertools
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

_CHANCES = (
    (0.0, 0.0, 0.0, 0.0),
    (0.2, 0.3, 0.4, 0.7),
    (0.2, 0.6, 0.4, 0.75),
    (0.35, 0.65, 0.45, 0.8),
    (0.35, 0.7, 0.45, 0.8),
    (0.35, 0.75, 0.45, 0.85),
    (0.4, 0.8, 0.7, 0.95),
)
"""How often a draft is right, by the length of its match and what the matches say (`agreement`):
rounded from greedy answers of SmolLM2-135M-Instruct (`benchmarks/replay.py`)."""
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
    def propose(self, state: DecodeState) -> tuple[Int[Array, "B drafts"], Int[Array, "B depth"]]:
        """Drafts for nodes 1, 2, ... (-1: none), and what kinds the first of each depth are of.

        A kind is a length of match and how far the matches agree (`matching.agreement`).
        """

    def kept(
        self,
        params: Parameters,
        last: Float[Array, "B D"],
        cache: KVCache,
        requests: Requests,
    ) -> AcceptanceRates:
        """How often drafts of each kind were right."""
        return self.rates(last.shape[0])

    def rates(self, batch: int) -> AcceptanceRates:
        """How often drafts of each kind are right, before any were tried."""
        known = [_CHANCES[min(length, len(_CHANCES) - 1)] for length in range(self.longest + 1)]
        return AcceptanceRates.empty(batch, tuple(itertools.chain(*known)), _BELIEF)

    def plan(
        self, state: DecodeState
    ) -> tuple[Int[Array, "B drafts"], Int[Array, "B depth"], Int[Array, ""]]:
        """What `propose` says, and the index of the number of rows that pays."""
        drafts, kinds = self.propose(state)
        available = jnp.sum(drafts >= 0, axis=1, dtype=jnp.int32)
        available = jnp.minimum(available, state.useful_drafts)
        weight = urgency(state.active, state.requests.budget)
        chances = state.extra.of(kinds)
        return drafts, kinds, best_size(self.sizes, self.costs, chances, available, weight)

    def step(self, params: Parameters, state: DecodeState) -> DecodeState:
        """Copies drafts out of the text and verifies the number of them that pays."""
        drafts, kinds, size = self.plan(state)
        rates: AcceptanceRates = state.extra

        def with_rows(rows: int) -> Any:
            tree = self.tree if rows == self.tree.size else TokenTree.chain(rows - 1)

            def verified(state: DecodeState) -> DecodeState:
                some, rule = drafts[:, : rows - 1], self.acceptance
                return verify_drafts(params, state, tree, some, acceptance=rule)[0]

            return verified

        state = in_place_switch(size, [with_rows(rows) for rows in self.sizes], state)
        accepted = jnp.maximum(state.emitted_count - 1, 0)
        return state.replace(extra=rates.after(kinds, state.drafted, accepted))
