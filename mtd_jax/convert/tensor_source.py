"""Named tensors in files, whatever the format: what the assembler reads from."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Protocol, runtime_checkable

import ml_dtypes
import numpy as np

from mtd_jax.errors import InputError

Index = tuple[slice, ...]
"""A slice an axis, with bounds and step 1."""

FLOATS: dict[str, np.dtype] = {
    "float32": np.dtype(np.float32),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
    "float16": np.dtype(np.float16),
}
"""The dtypes that weights may have, by the names the command line and config.json use."""


@runtime_checkable
class TensorSource(Protocol):
    """Tensors by name; nothing is read before `read`."""

    def names(self) -> Iterable[str]:
        """All tensors there are."""

    def problems(self) -> Mapping[str, Sequence[str]]:
        """What is wrong before a model is known: tensors that are there twice, say, by kind."""

    def shape(self, name: str) -> tuple[int, ...]:
        """Its sizes, outermost axis first."""

    def dtype(self, name: str) -> np.dtype:
        """What `read` returns; raises `InputError` if it is none of `FLOATS`."""

    def read(self, name: str, index: Index) -> np.ndarray:
        """A part of a tensor; valid until the next call."""

    def place(self, name: str) -> str:
        """The file that holds it, for error messages."""


def check_finite(values: np.ndarray, what: str) -> None:
    """Refuses weights with NaN or infinity.

    16-bit floats are looked at as integers: numpy has no fast loop for them.

    Raises:
      InputError: names `what`.
    """
    if values.dtype == FLOATS["float32"]:
        finite = bool(np.isfinite(values).all())
    else:
        exponent = np.uint16(0x7C00 if values.dtype == FLOATS["float16"] else 0x7F80)
        finite = not ((values.view(np.uint16) & exponent) == exponent).any()
    if not finite:
        raise InputError(f"{what} holds NaN or infinite values")
