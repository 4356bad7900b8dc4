"""Who sees whom: boolean masks over [rows, keys], True where a row may look.

Causal, four rows of one text (x sees, . does not), and the same with a window of two:

    keys   0 1 2 3      0 1 2 3
    row 0  x . . .      x . . .
    row 1  x x . .      x x . .
    row 2  x x x .      . x x .
    row 3  x x x x      . . x x
"""

from __future__ import annotations

from mtd_jax.typing import Array, Bool, Int


def causal(
    row_positions: Int[Array, "B T"], key_positions: Int[Array, "B S"]
) -> Bool[Array, "B T S"]:
    """A row sees the keys at its own and all earlier positions.

    Cache slots behind a row's text hold nothing yet: their position is beyond the row's, so the
    same comparison hides them.
    """
    return key_positions[:, None, :] <= row_positions[:, :, None]


def within_window(
    row_positions: Int[Array, "B T"],
    key_positions: Int[Array, "B S"],
    window: Int[Array, ""],
) -> Bool[Array, "B T S"]:
    """A row sees the last `window` positions, its own among them (to be joined with `causal`)."""
    return key_positions[:, None, :] > row_positions[:, :, None] - window
