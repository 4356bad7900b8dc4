"""Heads are trained where some text is long enough for each of them, wherever it lies."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np
import pytest

from mtd_jax import methods
from mtd_jax.errors import InputError
from mtd_jax.training.heads import HeadsTraining
from mtd_jax.training.rows import Rows
from mtd_jax.transformer.packed import Packed
from tests.support import heads

ROWS = 200


class _Texts(Rows):
    """A row for every text of these lengths."""

    def __init__(self, lengths: list[int]) -> None:
        self._batch = heads.packed([[5] * length for length in lengths])

    def __len__(self) -> int:
        return int(self._batch.tokens.shape[0])

    def __getitem__(self, row: int) -> Packed:
        return jax.tree.map(lambda x: np.asarray(x[row]), self._batch)


def _training(name: str, **options: Any) -> HeadsTraining:
    return HeadsTraining(methods.make_spec(name, options), (), seed=0, chunk=8)


@pytest.mark.parametrize("place", [0, 77, ROWS - 1])
def test_one_long_text_is_enough(place: int) -> None:
    lengths = [3] * ROWS
    lengths[place] = 5
    _training("medusa", count=3).check_rows(_Texts(lengths))


def test_heads_without_anything_to_learn_are_named() -> None:
    short = _Texts([3] * ROWS)
    with pytest.raises(InputError, match="medusa has nothing to learn for head_2, head_3: no text"):
        _training("medusa", count=3).check_rows(short)
    with pytest.raises(InputError, match="cp has nothing to learn for step_3, step_4: no text"):
        _training("cp", tokens=4).check_rows(short)
