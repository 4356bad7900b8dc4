"""One declaration a weight, and everything that follows from it.

A model or a method declares its weights once, as a tree whose leaves are `Weight`s. Initial values,
shapes, shardings (`sharding.py`) and counts are all read off that tree, so they cannot disagree.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from mtd_jax.typing import DTypeLike, Initializer

Tree = TypeVar("Tree")


@dataclasses.dataclass(frozen=True)
class Weight:
    """A weight before it has a value."""

    shape: tuple[int, ...]
    axes: tuple[str | None, ...]
    """A logical name for every axis (`sharding.RULES` says where each goes), None stays whole."""
    init: Initializer

    def __post_init__(self) -> None:
        if len(self.shape) != len(self.axes):
            raise ValueError(f"shape {self.shape} and axes {self.axes} differ in rank")


def initialize(declaration: Tree, key: jax.Array, dtype: DTypeLike = jnp.float32) -> Tree:
    """Values for every declared weight, each from a PRNG key of its own."""
    weights, structure = jax.tree.flatten(declaration)
    keys = jax.random.split(key, len(weights))
    values = [w.init(k, w.shape, dtype) for w, k in zip(weights, keys, strict=True)]
    return jax.tree.unflatten(structure, values)


def count(tree: Any) -> int:
    """Number of parameters in a tree of declarations or arrays."""
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(tree))


def size_in_bytes(tree: Any) -> int:
    """Bytes that the arrays (or abstract arrays) of a tree hold."""
    return sum(math.prod(x.shape) * np.dtype(x.dtype).itemsize for x in jax.tree.leaves(tree))
