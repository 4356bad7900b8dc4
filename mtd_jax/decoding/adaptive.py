"""How many drafts to verify: what they are expected to bring against what their rows cost.

Costs are measured on this machine (`evaluation.step_cost`) and given as an array; acceptance is
estimated while decoding runs. Both are dynamic, so changing one's mind compiles nothing.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import struct

from mtd_jax.typing import Array, Bool, Float, Int, Leaf

_FORGET = 0.96
"""A step's weight against the next one's: a text changes its ways about every 25 steps."""
_HURRY = 8.0
"""Tokens: a row that is so far ahead of the last one counts a third of it."""
_DOUBT = 1.25
"""What more rows cost over one counts so many times: a cost believed too low loses more than one
believed too high (`benchmarks/replay.py --measured`)."""
_PRIOR_YIELD = 3.0
"""Drafts: a measurement on many texts is believed until about so many say otherwise."""


class AcceptanceRates(struct.PyTreeNode):
    """How often drafts of each kind were right, lately.

    Kinds are the method's: how long a match a draft was copied behind, say. What is forgotten makes
    room for the prior, so a kind that failed gets another chance after a while.
    """

    accepted: Leaf
    """[B, kinds] float32"""
    tried: Leaf
    """[B, kinds] float32: drafts all of whose predecessors were accepted."""
    prior: Leaf
    """[B, kinds] float32: the share of right drafts that is believed in before any were tried."""
    belief: float = struct.field(pytree_node=False)
    """Tries that the prior counts as."""

    @classmethod
    def empty(
        cls, batch: int, prior: tuple[float, ...] | Float[Array, " kinds"], belief: float
    ) -> AcceptanceRates:
        """Nothing known yet but the prior of each kind."""
        zeros = jnp.zeros((batch, len(prior)), jnp.float32)
        return cls(zeros, zeros, zeros + jnp.asarray(prior, jnp.float32)[None], belief)

    def of(self, kinds: Int[Array, "B drafts"]) -> Float[Array, "B drafts"]:
        """The chance of each draft of a chain to be accepted, if those before it are."""
        rates = (self.accepted + self.prior * self.belief) / (self.tried + self.belief)
        return jnp.take_along_axis(rates, kinds, axis=1)

    def after(
        self,
        kinds: Int[Array, "B drafts"],
        drafted: Int[Array, " B"],
        accepted: Int[Array, " B"],
    ) -> AcceptanceRates:
        """The rates after a step that drafted and accepted so many tokens of those kinds."""
        rows = jnp.arange(kinds.shape[0], dtype=jnp.int32)[:, None]
        place = jnp.arange(kinds.shape[1], dtype=jnp.int32)[None, :]
        right = place < accepted[:, None]
        # The first that was wrong is news as well; those behind it were not looked at.
        tried = (place <= accepted[:, None]) & (place < drafted[:, None])

        def add(before: jax.Array, news: jax.Array) -> jax.Array:
            return (before * _FORGET).at[rows, kinds].add(news.astype(jnp.float32))

        added = add(self.accepted, right & tried), add(self.tried, tried)
        return AcceptanceRates(*added, self.prior, self.belief)


def urgency(active: Bool[Array, " B"], wanted: Int[Array, " B"]) -> Float[Array, " B"]:
    """What a token is worth to each row: a batch is done when its last row is.

    Drafts that bring those on that are ahead only make the others wait: every pass costs all of
    them the same. So a row counts the less, the fewer tokens are still `wanted` of it.
    """
    last = jnp.max(jnp.where(active, wanted, 0))
    ahead = (last - wanted).astype(jnp.float32)
    return jnp.where(active, jnp.exp(-ahead / _HURRY), 0.0)


def best_size(
    sizes: tuple[int, ...],
    costs: Float[Array, " sizes"],
    chances: Float[Array, "B drafts"],
    available: Int[Array, " B"],
    weight: Float[Array, " B"],
) -> Int[Array, ""]:
    """Index of the number of rows that emits most tokens a second; ties go to the fewest rows.

    Args:
      sizes: rows of a forward pass: one more than drafts.
      costs: seconds of a pass of that many rows, in any unit.
      chances: of each draft of a chain to be accepted, if those before it are.
      available: drafts that each row has, or may emit.
      weight: what a token of each row counts (`urgency`).
    """
    return _best(1.0 + hoped_of_chains(sizes, chances, available), costs, weight)


def hoped_of_chains(
    sizes: tuple[int, ...], chances: Float[Array, "B drafts"], available: Int[Array, " B"]
) -> Float[Array, "sizes B"]:
    """Drafts of a chain that are expected to be kept, by the rows of the pass that verifies it.

    The arguments are those of `best_size`.
    """
    drafts = jnp.asarray([size - 1 for size in sizes], jnp.int32)
    place = jnp.arange(chances.shape[1], dtype=jnp.int32)[None, :]
    accepted = jnp.cumprod(jnp.where(place < available[:, None], chances, 0.0), axis=1)
    used = place[None] < drafts[:, None, None]
    return jnp.sum(jnp.where(used, accepted[None], 0.0), axis=-1)


class Yields(struct.PyTreeNode):
    """How many drafts were accepted lately, beside how many were expected to be.

    For trees built from measured accuracies: a text may be easier or harder than those that they
    were measured on. What is forgotten makes room for the measurement.
    """

    accepted: Leaf
    """[B] float32"""
    expected: Leaf
    """[B] float32"""

    @classmethod
    def empty(cls, batch: int) -> Yields:
        """Nothing known yet."""
        zeros = jnp.zeros(batch, jnp.float32)
        return cls(zeros, zeros)

    def ratio(self) -> Float[Array, " B"]:
        """Accepted drafts for each expected one."""
        return (self.accepted + _PRIOR_YIELD) / (self.expected + _PRIOR_YIELD)

    def after(self, accepted: Int[Array, " B"], expected: Float[Array, " B"]) -> Yields:
        """The yields after a step; one without drafts expects and accepts 0."""
        return Yields(
            self.accepted * _FORGET + accepted.astype(jnp.float32),
            self.expected * _FORGET + expected,
        )


def best_tree_index(
    hoped: Float[Array, "trees B"],
    costs: Float[Array, " trees"],
    weight: Float[Array, " B"],
    wanted: Int[Array, " B"],
) -> Int[Array, ""]:
    """Index of the tree that emits most tokens a second; of equals the first.

    Args:
      hoped: drafts of each tree that are expected to be accepted.
      costs: seconds of a step with it, in any unit.
      weight: what a token of each row counts (`urgency`).
      wanted: tokens that each row may still emit.
    """
    tokens = jnp.minimum(1.0 + hoped, wanted.astype(jnp.float32)[None, :])
    return _best(tokens, costs, weight)


def _best(
    tokens: Float[Array, "choices B"], costs: Float[Array, " choices"], weight: Float[Array, " B"]
) -> Int[Array, ""]:
    one = costs[0]
    doubted = jnp.where(costs > one, one + _DOUBT * (costs - one), costs)
    return jnp.argmax(jnp.sum(tokens * weight[None, :], axis=1) / doubted).astype(jnp.int32)
