"""The drawings in `transformer/masks.py` are the expected values."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import pytest

from mtd_jax.transformer import masks


def _drawing(text: str) -> np.ndarray:
    return np.array([[cell == "x" for cell in row.split()] for row in text.strip().split("\n")])


def _from_docstring(column: int) -> np.ndarray:
    """The matrix in the module's docstring: column 0 is plain causal, 1 has a window of two."""
    rows = [line for line in (masks.__doc__ or "").split("\n") if line.strip().startswith("row")]
    cells = [line.split()[2:] for line in rows]
    return np.array([[cell == "x" for cell in row[4 * column : 4 * column + 4]] for row in cells])


POSITIONS = jnp.arange(4, dtype=jnp.int32)[None]


def test_causal_is_as_drawn() -> None:
    np.testing.assert_array_equal(masks.causal(POSITIONS, POSITIONS)[0], _from_docstring(0))


def test_window_is_as_drawn() -> None:
    window = masks.within_window(POSITIONS, POSITIONS, jnp.int32(2))
    seen = masks.causal(POSITIONS, POSITIONS) & window
    np.testing.assert_array_equal(seen[0], _from_docstring(1))


def test_rows_against_a_longer_cache() -> None:
    rows = jnp.array([[2, 3]], jnp.int32)
    keys = jnp.arange(6, dtype=jnp.int32)[None]
    expected = _drawing("""
x x x . . .
x x x x . .
""")
    np.testing.assert_array_equal(masks.causal(rows, keys)[0], expected)


@pytest.mark.parametrize("window", [1, 3, 4, 100])
def test_window_counts_the_row_itself(window: int) -> None:
    seen = masks.causal(POSITIONS, POSITIONS) & masks.within_window(
        POSITIONS, POSITIONS, jnp.int32(window)
    )
    np.testing.assert_array_equal(seen[0].sum(-1), np.minimum(np.arange(1, 5), window))
