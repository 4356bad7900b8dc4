"""The axis legend, printed once, and the array aliases that use it.

    B  batch rows                 N  query heads
    T  token rows of one call     K  key/value heads (G = N / K query heads share one)
    S  cache length (a bucket)    H  width of one head
    L  layers                     F  width of the MLP
    D  width of the model         V  vocabulary
    E  most tokens that one step emits for one row

The same letters stand in jaxtyping annotations and in einsum strings. Annotations are checked at
test time only (`--jaxtyping-packages`, see pyproject.toml); at run time they cost nothing.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeAlias, TypeGuard

import jax
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int, UInt32

__all__ = [
    "Array",
    "Bool",
    "DTypeLike",
    "Float",
    "Initializer",
    "Int",
    "Leaf",
    "UInt32",
    "is_number",
    "is_whole",
]

if TYPE_CHECKING:
    Leaf: TypeAlias = jax.Array
else:
    # A field of a pytree holds an array in use, but a `Weight`, an abstract array, a sharding or a
    # gradient's zero while JAX or we map over the tree. Its docstring says the shape.
    Leaf = Any

Initializer: TypeAlias = Callable[[jax.Array, tuple[int, ...], DTypeLike], jax.Array]
"""`(key, shape, dtype) -> array`, as in `jax.nn.initializers`."""


def is_whole(value: Any) -> TypeGuard[int]:
    """Whether it is a whole number of Python; True is none."""
    return isinstance(value, int) and not isinstance(value, bool)


def is_number(value: Any) -> TypeGuard[int | float]:
    """Whether it is a number of Python; True is none."""
    return isinstance(value, int | float) and not isinstance(value, bool)
