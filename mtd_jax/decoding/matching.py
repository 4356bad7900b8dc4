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


def _has_follower(capacity: int, length: jax.Array) -> jax.Array:
    return jnp.arange(capacity, dtype=jnp.int32)[None, :] < length[:, None] - 1
