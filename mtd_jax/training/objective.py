"""What a run learns: which weights, from what loss, and how it is decoded.

An objective is a frozen, hashable description without arrays; the step is compiled for it. Weights
come in two trees, trainable and frozen, and only the first is differentiated.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import typing
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, Protocol, TypeAlias, runtime_checkable

import jax
import jax.numpy as jnp

from mtd_jax import methods, sharding
from mtd_jax.config import Anchor, CycleConfig
from mtd_jax.decoding.heads import WholeSpec
from mtd_jax.decoding.method import Method
from mtd_jax.errors import InputError, unknown_name
from mtd_jax.methods.autoregressive import Autoregressive
from mtd_jax.methods.cycles import (
    cycle_hidden,
    kinds_of_places,
    place_names,
    places_in_cycle,
)
from mtd_jax.methods.dmtd import DEFAULT_LATE, DMTD
from mtd_jax.methods.options import read_options
from mtd_jax.training.config import TrainConfig
from mtd_jax.training.heads import HeadsTraining
from mtd_jax.training.utilization import weights_in_products
from mtd_jax.training.whole import WholeTraining
from mtd_jax.transformer.losses import Totals, cross_entropy
from mtd_jax.transformer.model import Parameters
from mtd_jax.transformer.packed import Packed, packed_hidden
from mtd_jax.transformer.stack import Remat

Counts: TypeAlias = dict[str, jax.Array]
"""What a mean is taken over, by name: float32 scalars that add up over batches."""


@runtime_checkable
class Objective(Protocol):
    """What the loop must know of a method to train it."""

    def split(self, params: Parameters) -> tuple[Any, Any]:
        """(trainable, frozen): two trees that hold each weight once; works on abstract ones too."""

    def counts(self, batch: Packed) -> Counts:
        """How much of each kind there is to learn in a batch; "loss" among them."""

    def loss(
        self, trainable: Any, frozen: Any, batch: Packed, counts: Counts, key: jax.Array | None
    ) -> tuple[jax.Array, Totals]:
        """The batch's share of the loss and of the measurements.

        `counts` are those of everything that is averaged over, of which `batch` may be a part:
        shares of parts add up to the whole. `key` is for objectives that draw; None when they are
        only measured.
        """

    def flops(self, trainable: Any, frozen: Any) -> float:
        """Floating-point operations of a step per token, attention left out.

        For each weight in a product 2 in the forward pass, 2 for the gradient of the row, 2 for its
        own. Nothing is counted twice because it is computed twice (remat).
        """

    def decoder(self, trainable: Any, frozen: Any) -> tuple[Parameters, Method]:
        """The model and the method that decode with these weights."""


@dataclasses.dataclass(frozen=True)
class FineTuning:
    """The next token, by the whole model: plain fine-tuning (`sft`).

    The reference that every retrained method is measured against.
    """

    freeze: tuple[str, ...] = ()
    """Beginnings of the paths of weights that stay: `embedding`, `blocks.gate_up`."""
    remat: Remat = "layer"
    chunk: int = 1024
    """Positions whose logits a device holds at a time, over all its rows."""

    def split(self, params: Parameters) -> tuple[Any, Any]:
        """By `freeze`.

        Raises:
          InputError: a path that no weight's begins with, or nothing left to train.
        """
        # Weights that are trained for other cycles, or for none, must not say the old ones.
        params = params.replace(config=dataclasses.replace(params.config, cycles=self._cycles()))
        paths, leaves, structure = _named_leaves(params)
        for name in self.freeze:
            if not any(_begins(path, name) for path in paths):
                raise unknown_name("weight to freeze", name, paths)
        stays = [any(_begins(path, name) for name in self.freeze) for path in paths]
        if all(stays):
            raise InputError("freeze leaves nothing to train")
        trainable = [None if s else leaf for s, leaf in zip(stays, leaves, strict=True)]
        frozen = [leaf if s else None for s, leaf in zip(stays, leaves, strict=True)]
        return jax.tree.unflatten(structure, trainable), jax.tree.unflatten(structure, frozen)

    def _cycles(self) -> CycleConfig | None:
        return None

    def counts(self, batch: Packed) -> Counts:
        """Tokens to predict."""
        return {"loss": batch.targets()[1].sum(dtype=jnp.float32)}

    def loss(
        self, trainable: Any, frozen: Any, batch: Packed, counts: Counts, key: jax.Array | None
    ) -> tuple[jax.Array, Totals]:
        """Mean cross-entropy of the next token."""
        del key
        params = joined(trainable, frozen)
        x = packed_hidden(params, batch, remat=self.remat)
        return self._loss(params, x, batch, counts)

    def _loss(
        self,
        params: Parameters,
        x: jax.Array,
        batch: Packed,
        counts: Counts,
        kinds: jax.Array | None = None,
        names: tuple[str, ...] = (),
    ) -> tuple[jax.Array, Totals]:
        """Of the last layer's output; that of each kind of rows beside the whole."""
        targets, wanted = batch.targets()
        chunk = max(1, self.chunk // max(1, x.shape[0] // sharding.parts("batch")))
        totals = cross_entropy(params, x, targets, wanted, chunk=chunk, kinds=kinds, names=names)
        share = jnp.maximum(counts["loss"], 1.0)
        loss = totals["loss"] / share
        alone = {f"loss_{n}": totals[f"loss_{n}"] / jnp.maximum(counts[n], 1.0) for n in names}
        return loss, {"loss": loss, "accuracy": totals["right"] / share, **alone}

    def flops(self, trainable: Any, frozen: Any) -> float:
        """All products forward, those with trained weights for these, and some for the rows.

        Gradients of rows are made down to the first trained weight, where the backward pass ends.
        """
        params = joined(trainable, frozen)
        every = weights_in_products(params)
        above = every if reaches_layers(trainable) else 0
        if not above and trainable.final_norm is not None:
            above = math.prod((params.embedding if params.head is None else params.head).shape)
        return 2.0 * (every + above + weights_in_products(trainable))

    def decoder(self, trainable: Any, frozen: Any) -> tuple[Parameters, Method]:
        """Plain decoding."""
        return joined(trainable, frozen), Autoregressive()


@dataclasses.dataclass(frozen=True)
class CycleTuning(FineTuning):
    """The next token, by the whole model in cycles (`dmtd`); see `methods.dmtd`.

    One cross-entropy over all tokens. The loss of each place in a cycle is measured beside it:
    `loss_1` of what heads predict, `loss_2` of what the rows behind them do, and so on;
    `loss_plain` of rows outside of cycles: a prompt's last one, or all of it where it is learned.
    """

    cycle: int = 4
    early: int = 0
    late: int = DEFAULT_LATE
    anchor: Anchor = "prompt"
    random_phase: bool = False
    """Cycles of each row of a batch are moved by a number of places drawn anew in each step."""

    def __post_init__(self) -> None:
        # The factory refuses what no cycle can be.
        methods.dmtd(cycle=self.cycle, early=self.early, late=self.late)

    def _cycles(self) -> CycleConfig | None:
        return CycleConfig(early=self.early, late=self.late, cycle=self.cycle, anchor=self.anchor)

    def counts(self, batch: Packed) -> Counts:
        """Tokens to predict, all and by place."""
        wanted = batch.targets()[1]
        kinds = kinds_of_places(self._places(batch, None), self.cycle)
        names = enumerate(place_names(self.cycle, self.anchor))
        alone = {n: (wanted & (kinds == i)).sum(dtype=jnp.float32) for i, n in names}
        return {**super().counts(batch), **alone}

    def loss(
        self, trainable: Any, frozen: Any, batch: Packed, counts: Counts, key: jax.Array | None
    ) -> tuple[jax.Array, Totals]:
        """Mean cross-entropy of the next token, from the late layers' output at every place."""
        params = joined(trainable, frozen)
        shift = None
        if self.random_phase and key is not None:
            shift = jax.random.randint(key, batch.tokens.shape[:1], 0, self.cycle)
        places = self._places(batch, shift)
        x = cycle_hidden(params, batch, places, early=self.early, late=self.late, remat=self.remat)
        kinds = kinds_of_places(places, self.cycle)
        # Places that are moved at random are no longer those that `counts` has counted.
        names = place_names(self.cycle, self.anchor) if shift is None else ()
        return self._loss(params, x, batch, counts, kinds, names)

    def decoder(self, trainable: Any, frozen: Any) -> tuple[Parameters, Method]:
        """Decoding in the same cycles."""
        return joined(trainable, frozen), methods.dmtd(cycle=self.cycle)

    def _places(self, batch: Packed, shift: jax.Array | None) -> jax.Array:
        return places_in_cycle(batch, self.cycle, self.anchor, shift)


def make_objective(config: TrainConfig) -> Objective:
    """The objective of a run.

    Raises:
      InputError: an unknown method, or an option that it does not have.
    """
    if config.method not in _OBJECTIVES:
        raise unknown_name("method to train", config.method, _OBJECTIVES)
    return _OBJECTIVES[config.method](config)


def joined(trainable: Any, frozen: Any) -> Any:
    """The inverse of a split by leaves: each leaf from the tree that has it."""
    return jax.tree.map(
        lambda a, b: b if a is None else a, trainable, frozen, is_leaf=lambda x: x is None
    )


def _fine_tuning(kind: type[FineTuning], config: TrainConfig) -> Objective:
    known = typing.get_type_hints(kind)
    for shared in typing.get_type_hints(FineTuning):  # not among [options]
        del known[shared]
    options = read_options(config.method, known, config.options)
    memory = config.memory
    return kind(freeze=config.freeze, remat=memory.remat, chunk=memory.loss_chunk, **options)


def reaches_layers(trainable: Any) -> bool:
    """Whether the backward pass goes through the layers: a weight in or below them is trained."""
    paths, _, _ = _named_leaves(trainable)
    return any(not {"blocks", "embedding"}.isdisjoint(path.split(".")) for path in paths)


def _heads(config: TrainConfig) -> Objective:
    if config.freeze:
        raise InputError(f"{config.method} trains no weight of the model: leave out freeze")
    options = methods.typed_options(config.method, config.options)
    spec = methods.make_spec(config.method, options)
    about = tuple(sorted(options.items()))
    if isinstance(spec, WholeSpec) and spec.trunk == "trained":
        memory = config.memory
        return WholeTraining(spec, about, config.seed, memory.loss_chunk, remat=memory.remat)
    # Which tokens the texts use most is not known yet; as many others have the same shapes.
    vocabulary = tuple(range(spec.vocabulary))
    return HeadsTraining(spec, about, config.seed, config.memory.loss_chunk, vocabulary)


_OBJECTIVES: Mapping[str, Callable[[TrainConfig], Objective]] = MappingProxyType(
    {
        "sft": functools.partial(_fine_tuning, FineTuning),
        DMTD.name: functools.partial(_fine_tuning, CycleTuning),
        **dict.fromkeys(methods.SPECS, _heads),
    }
)


def _named_leaves(tree: Any) -> tuple[list[str], list[Any], Any]:
    named, structure = jax.tree.flatten_with_path(tree)
    paths = [jax.tree_util.keystr(path, simple=True, separator=".") for path, _ in named]
    return paths, [leaf for _, leaf in named], structure


def _begins(path: str, name: str) -> bool:
    return path == name or path.startswith(f"{name}.")
