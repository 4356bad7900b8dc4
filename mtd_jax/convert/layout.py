"""From the axes of a tensor in a file to those of a stacked leaf, and back.

A pattern such as `(K G H) D -> D K G H` says it all; a part of the leaf (a device's shard) is read
from the part of the file that holds it.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Callable, Mapping

import numpy as np

from mtd_jax.config import ModelConfig
from mtd_jax.convert.tensor_source import Index

Axes = tuple[tuple[str, ...], ...]


def axis_sizes(config: ModelConfig) -> dict[str, int]:
    """The letters of the patterns: those of `typing.py`, R = H / 2, and the numbers 1 and 2."""
    return {
        "V": config.vocab_size,
        "D": config.hidden_size,
        "F": config.intermediate_size,
        "K": config.num_kv_heads,
        "G": config.group_size,
        "H": config.head_dim,
        "R": config.head_dim // 2,
        "1": 1,
        "2": 2,
    }


@dataclasses.dataclass(frozen=True)
class Layout:
    """One pattern with its sizes."""

    file_axes: Axes
    leaf_axes: Axes
    sizes: Mapping[str, int]

    @classmethod
    def parse(cls, pattern: str, sizes: Mapping[str, int]) -> Layout:
        """The layout of `file axes -> leaf axes`."""
        file_side, leaf_side = pattern.split(" -> ")
        return cls(_axes(file_side), _axes(leaf_side), sizes)

    @property
    def file_shape(self) -> tuple[int, ...]:
        """The shape of the tensor in the file."""
        return self._shape(self.file_axes)

    @property
    def leaf_shape(self) -> tuple[int, ...]:
        """The shape of what it fills of one layer of the leaf."""
        return self._shape(self.leaf_axes)

    @property
    def outer_leaf_axis(self) -> int | None:
        """The axis of the leaf that is the outermost one of the file (None: a part of an axis)."""
        outermost = (self.file_axes[0][0],)
        return self.leaf_axes.index(outermost) if outermost in self.leaf_axes else None

    def to_leaf(self, read: Callable[[Index], np.ndarray], index: Index) -> np.ndarray:
        """The part `index` of what the tensor fills; `read` fetches a part of the tensor.

        Only what lies in the part is read along axes that the pattern moves whole (any order) or
        has outermost in a joined axis; the rest is cut afterwards.
        """
        cut = {
            axes[0]: span
            for axes, span in zip(self.leaf_axes, index, strict=True)
            if len(axes) == 1 and any(a[0] == axes[0] for a in self.file_axes)
        }
        sizes = {**self.sizes, **{name: span.stop - span.start for name, span in cut.items()}}
        wanted = []
        for axes in self.file_axes:
            inner = math.prod(self.sizes[a] for a in axes[1:])
            span = cut.get(axes[0], slice(0, self.sizes[axes[0]]))
            wanted.append(slice(span.start * inner, span.stop * inner))
        values = read(tuple(wanted))
        file_order = [a for axes in self.file_axes for a in axes]
        leaf_order = [a for axes in self.leaf_axes for a in axes if a in file_order]
        values = values.reshape([sizes[a] for a in file_order])
        values = values.transpose([file_order.index(a) for a in leaf_order])
        values = values.reshape([math.prod(sizes[a] for a in axes) for axes in self.leaf_axes])
        rest = [
            slice(None) if len(axes) == 1 and axes[0] in cut else span
            for axes, span in zip(self.leaf_axes, index, strict=True)
        ]
        return values[tuple(rest)]

    def to_file(self, part: np.ndarray) -> np.ndarray:
        """The tensor as the file holds it, from all that it fills of one layer (a view of it)."""
        file_order = [a for axes in self.file_axes for a in axes]
        leaf_order = [a for axes in self.leaf_axes for a in axes if a in file_order]
        values = part.reshape([self.sizes[a] for a in leaf_order])
        values = values.transpose([leaf_order.index(a) for a in file_order])
        return values.reshape(self.file_shape)

    def _shape(self, axes: Axes) -> tuple[int, ...]:
        return tuple(math.prod(self.sizes[a] for a in joined) for joined in axes)


def _axes(side: str) -> Axes:
    """`(K G H) D` -> (("K", "G", "H"), ("D",))."""
    return tuple(tuple(g.strip("()").split()) for g in re.findall(r"\([^)]*\)|\S+", side))
