"""Hidden Transfer's weights, where its rows enter the layers, and their training in one pass.

See `hidden_transfer`. All positions of a text are trained at once: the text runs through the lower
layers alone, and from the first transfer layer on every position has its pseudo rows beside it
(`transformer.beside`). Only the maps W_i have gradients, so only what pseudo rows pass is stored.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Iterable, Iterator
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jax.nn import initializers

from mtd_jax import parameters
from mtd_jax.config import ModelConfig
from mtd_jax.errors import InputError
from mtd_jax.methods.row_heads import RowHeadsSpec
from mtd_jax.parameters import Weight
from mtd_jax.transformer import block
from mtd_jax.transformer.beside import Beside
from mtd_jax.transformer.linear import contract
from mtd_jax.transformer.model import Parameters, embed, normed
from mtd_jax.transformer.packed import Packed, packed_rows
from mtd_jax.transformer.stack import frozen_range, train_beside
from mtd_jax.typing import Array, Bool, Float, Int


class TransferWeights(struct.PyTreeNode):
    """What is trained: what each map differs from the identity by."""

    weight: Any
    """[k, D, D]: W_i is `weight[i]`; None where it has a low rank."""
    down: Any = None
    """[k, D, R]: then W_i = `down[i] @ up[i]`."""
    up: Any = None
    """[k, R, D]"""

    @property
    def count(self) -> int:
        """k: maps."""
        leaf = self.up if self.weight is None else self.weight
        return int(leaf.shape[0])

    def row(self, i: int, h: Float[Array, "*rows D"]) -> Float[Array, "*rows D"]:
        """h + h W_i: the pseudo state of map i (from 0)."""
        if self.weight is not None:
            return h + contract("...D,DE->...E", h, self.weight[i].astype(h.dtype))
        narrow = contract("...D,DR->...R", h, self.down[i].astype(h.dtype))
        return h + contract("...R,RE->...E", narrow, self.up[i].astype(h.dtype))

    def first(self, count: int) -> TransferWeights:
        """The maps of the first `count` places."""
        return jax.tree.map(lambda w: w[:count], self)


@dataclasses.dataclass(frozen=True)
class Way:
    """Which pseudo rows pass which layers, and what they see of each other."""

    layers: tuple[int, ...]
    """Of each map: layers that the text has passed when it is applied."""
    chained: bool

    @property
    def marks(self) -> tuple[int, ...]:
        """The different `layers`, ascending: what enters each must be known."""
        return tuple(sorted(set(self.layers)))

    def first(self, count: int) -> Way:
        """Of the first `count` maps."""
        return Way(self.layers[:count], self.chained)

    def stages(self, config: ModelConfig) -> tuple[tuple[int, int], ...]:
        """Ranges of layers that the same pseudo rows pass."""
        return tuple(itertools.pairwise((*self.marks, config.num_layers)))

    def entered(
        self,
        weights: TransferWeights,
        h: Float[Array, "B N D"],
        pseudo: Float[Array, "B N A D"] | None,
        start: int,
    ) -> Float[Array, "B N more D"]:
        """The pseudo rows that pass layer `start`: those from below, and those that `h` makes."""
        rows = {i: weights.row(i, h) for i, layer in enumerate(self.layers) if layer == start}
        if pseudo is not None:
            rows |= {i: pseudo[:, :, place] for place, i in enumerate(self._before(start))}
        return jnp.stack([rows[i] for i in sorted(rows)], axis=2)

    def beside(
        self,
        config: ModelConfig,
        start: int,
        places: Int[Array, "B N"],
        mask: Bool[Array, "B N S"],
        keys: Int[Array, "B S"],
    ) -> Beside:
        """How the pseudo rows of layer `start` stand beside the `places` of their texts."""
        ahead = tuple(i + 1 for i in self._before(start + 1))
        own = np.tri(len(ahead), dtype=np.bool_) if self.chained else np.eye(len(ahead), dtype=bool)
        return Beside.at(config, places, ahead, own, mask, keys)

    def _before(self, start: int) -> tuple[int, ...]:
        return tuple(i for i, layer in enumerate(self.layers) if layer < start)


@dataclasses.dataclass(frozen=True)
class HiddenTransferSpec(RowHeadsSpec):
    """Options of Hidden Transfer that say what is trained, and how.

    Raises:
      InputError: a value outside its range.
    """

    layers: str = ""
    """t_i: layers that the text has passed where each map is applied, `14,16,18`; one number stands
    for all. By default half of the model's layers."""
    rank: int = 0
    """R of the maps; 0 is full."""
    chained: bool = True
    """Pseudo rows see the earlier ones of their place; else the text alone."""

    name: ClassVar[str] = "hidden_transfer"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.rank < 0:
            raise InputError(f"rank must be 0 (full) or more, got {self.rank}")
        if len(self._numbers()) not in (0, 1, self.count):
            raise InputError(
                f"layers must be one number, or {self.count} of them (count), got '{self.layers}'"
            )

    def way(self, config: ModelConfig) -> Way:
        """Where the maps stand in a model.

        Raises:
          InputError: at a layer that it does not have, or has nothing behind.
        """
        found = self._numbers() or (max(1, config.num_layers // 2),)
        for layer in found:
            if not 1 <= layer < config.num_layers:
                raise InputError(
                    f"layers must be between 1 and {config.num_layers - 1} in a model of "
                    f"{config.num_layers}, got {layer}"
                )
        return Way(found * self.count if len(found) == 1 else found, self.chained)

    def _numbers(self) -> tuple[int, ...]:
        # `mtd bench` parts methods by commas.
        texts = [part.strip() for part in self.layers.replace("+", ",").split(",")]
        if texts == [""]:
            return ()
        if not all(text.isdecimal() and len(text) < 6 for text in texts):
            raise InputError(f"layers must be numbers like 14,16,18, got '{self.layers[:40]}'")
        return tuple(map(int, texts))

    def declare(self, config: ModelConfig) -> TransferWeights:
        """`Weight`s; zeros make every map the identity."""
        self.way(config)
        width, zeros = config.hidden_size, initializers.zeros
        if not self.rank:
            square = (self.count, width, width)
            return TransferWeights(weight=Weight(square, (None, "embed", None), zeros))
        if self.rank >= width:
            raise InputError(f"rank must be under the model's width {width}, got {self.rank}")
        down, up = (self.count, width, self.rank), (self.count, self.rank, width)
        drawn = initializers.normal(1 / math.sqrt(width))
        return TransferWeights(
            weight=None,
            down=Weight(down, (None, "embed", None), drawn),
            up=Weight(up, (None, None, "embed"), zeros),
        )

    def initial(self, base: Parameters, key: jax.Array) -> TransferWeights:
        """Identities."""
        return parameters.initialize(self.declare(base.config), key)

    def rows(
        self, weights: TransferWeights, base: Parameters, batch: Packed
    ) -> tuple[Float[Array, "B T D"], Float[Array, "B T k D"]]:
        """All positions at once; see the module's docstring."""
        x, pseudo = hidden_states(self.way(base.config), weights, base, batch)
        return normed(base, x), normed(base, pseudo)

    def flops(self, config: ModelConfig) -> float:
        """Pseudo rows 2 for each weight forward and 2 back; the maps 2 and 2 for their gradients.

        A map's input has no gradient.
        """
        layer = block.declare(config)
        matrices = (layer.qkv, layer.attention_out, layer.gate_up, layer.down)
        each = sum(math.prod(matrix.shape[1:]) for matrix in matrices)
        passed = sum(config.num_layers - start for start in self.way(config).layers)
        output = config.hidden_size * self.tokens(config) * self.count
        return 4.0 * (passed * each + output + parameters.count(self.declare(config)))


def hidden_states(
    way: Way, weights: TransferWeights, base: Parameters, batch: Packed
) -> tuple[Float[Array, "B T D"], Float[Array, "B T k D"]]:
    """What the last layer makes of a batch, and of k pseudo rows at each of its positions.

    Gradients reach the weights alone. Layers below the first transfer store nothing.
    """
    found = rows_by_stage(way, weights, base, batch, way.stages(base.config))
    *_, (_, x, pseudo) = found
    return x, pseudo


def rows_by_stage(
    way: Way,
    weights: TransferWeights,
    base: Parameters,
    batch: Packed,
    stages: Iterable[tuple[int, int]],
) -> Iterator[tuple[int, Float[Array, "B T D"], Float[Array, "B T entered D"]]]:
    """Layers passed, the text's rows and the pseudo rows: as they enter each stage, and at the end.

    Args:
      stages: `Way.stages`, or finer ones.
    """
    config, base = base.config, jax.lax.stop_gradient(base)
    rows = packed_rows(config, batch)
    x = frozen_range(config, base.blocks, embed(base, batch.tokens), 0, way.marks[0], rows=rows)
    pseudo = None
    for start, stop in stages:
        pseudo = way.entered(weights, x, pseudo, start)
        yield start, x, pseudo
        beside = way.beside(config, start, rows.positions, rows.mask, rows.keys)
        flat = pseudo.reshape(pseudo.shape[0], -1, pseudo.shape[-1])
        x, flat = train_beside(config, base.blocks, x, flat, start, stop, rows=rows, beside=beside)
        pseudo = flat.reshape(pseudo.shape)
    assert pseudo is not None  # there is a map at least
    yield config.num_layers, x, pseudo
