"""Who sees whom: boolean masks over [rows, keys], True where a row may look.

Causal, four rows of one text (x sees, . does not), and the same with a window of two:

    keys   0 1 2 3      0 1 2 3
    row 0  x . . .      x . . .
    row 1  x x . .      x x . .
    row 2  x x x .      . x x .
    row 3  x x x x      . . x x

A tree of drafts behind a committed text of two tokens. Node 0 is the newest token; 1 and 2 are two
guesses at what follows it, 3 follows 1. Rows see the text, their ancestors and themselves:

    slots   0 1   2 3 4 5
    node 0  x x   x . . .
    node 1  x x   x x . .
    node 2  x x   x . x .
    node 3  x x   x x . x
"""

from __future__ import annotations

import jax.numpy as jnp

from mtd_jax.typing import Array, Bool, Int


def causal(
    row_positions: Int[Array, "B T"], key_positions: Int[Array, "B S"]
) -> Bool[Array, "B T S"]:
    """A row sees the keys at its own and all earlier positions.

    Cache slots behind a row's text hold nothing yet: their position is beyond the row's, so the
    same comparison hides them.
    """
    return key_positions[:, None, :] <= row_positions[:, :, None]


def tree(
    committed: Int[Array, " B"], ancestors: Bool[Array, "b T T"], capacity: int
) -> Bool[Array, "B T S"]:
    """Rows of a tree see what is committed, their ancestors, and themselves.

    Row t lies in slot `committed + t`; `ancestors[b, t, u]` says that u is t or an ancestor of it,
    in the tree of batch row b or (b = 1) of all.
    """
    behind = jnp.arange(capacity, dtype=jnp.int32)[None, :] - committed[:, None]
    count = ancestors.shape[1]
    inside = (behind >= 0) & (behind < count)
    seen = jnp.take_along_axis(ancestors, jnp.clip(behind, 0, count - 1)[:, None, :], axis=2)
    return (behind < 0)[:, None, :] | (inside[:, None, :] & seen)


def within_window(
    row_positions: Int[Array, "B T"],
    key_positions: Int[Array, "B S"],
    window: Int[Array, ""],
) -> Bool[Array, "B T S"]:
    """A row sees the last `window` positions, its own among them (to be joined with `causal`)."""
    return key_positions[:, None, :] > row_positions[:, :, None] - window
