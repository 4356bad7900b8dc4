"""Where the end of a text occurred before: the common part of the methods that copy from it."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from mtd_jax.typing import Array, Int


def suffix_matches(
    text: Int[Array, "B C"], length: Int[Array, " B"], longest: int
) -> Int[Array, "B C"]:
    """How many tokens up to position i equal those at the end of the text, `longest` at most.

    0 where the token behind i is not part of the text, so every match has a continuation.
    """
    batch, capacity = text.shape
    padded = jnp.pad(text, ((0, 0), (longest, 0)), constant_values=-1)
    matched = jnp.zeros((batch, capacity), jnp.int32)
    equal = _has_follower(capacity, length)
    for back in range(longest):
        last = jnp.take_along_axis(text, jnp.maximum(length - 1 - back, 0)[:, None], axis=1)
        equal = equal & (padded[:, longest - back : longest - back + capacity] == last)
        matched = matched + equal.astype(jnp.int32)
    return matched


def extended_matches(
    matched: Int[Array, "B C"],
    text: Int[Array, "B C"],
    length: Int[Array, " B"],
    token: Int[Array, " B"],
    longest: int,
) -> Int[Array, "B C"]:
    """`suffix_matches` of the text with one more `token` behind it, from those without it."""
    before = jnp.pad(matched[:, :-1], ((0, 0), (1, 0)))
    here = (text == token[:, None]) & _has_follower(text.shape[1], length)
    return jnp.where(here, jnp.minimum(before + 1, longest), 0)


KINDS = 4
"""Ways in which places may agree on what comes next (`agreement`)."""


def followers(text: Int[Array, "B C"]) -> Int[Array, "B C"]:
    """The token behind each position."""
    return jnp.pad(text[:, 1:], ((0, 0), (0, 1)))


def agreement(
    matched: Int[Array, "B C"], text: Int[Array, "B C"], token: Int[Array, " B"]
) -> Int[Array, " B"]:
    """How sure a draft is: its match's length times `KINDS`, plus what the longest matches say.

    0: half of them or fewer are followed by `token`; 1: there is only one; 2: more than half; 3:
    all of several. A draft that no match speaks for is of kind 0.
    """
    best = jnp.max(matched, axis=1)
    longest = (matched == best[:, None]) & (matched > 0)
    places = jnp.sum(longest, axis=1, dtype=jnp.int32)
    agreeing = jnp.sum(longest & (followers(text) == token[:, None]), axis=1, dtype=jnp.int32)
    conditions = [places == 1, agreeing == places, 2 * agreeing > places]
    how = jnp.select(conditions, [1, 3, 2], 0)
    return jnp.where(agreeing > 0, best * KINDS + how, 0).astype(jnp.int32)


def _has_follower(capacity: int, length: jax.Array) -> jax.Array:
    return jnp.arange(capacity, dtype=jnp.int32)[None, :] < length[:, None] - 1
