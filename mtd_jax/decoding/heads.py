"""Weights of a method's own, and what a method says of them so that they can be trained and kept.

A method with trained weights has a *spec*: a frozen dataclass with the options that shape the
weights or their training (how many heads, which loss). Training, files and decoding know methods by
their specs alone.
"""

from __future__ import annotations

import abc
import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar, Literal

import jax
import numpy as np

from mtd_jax.config import ModelConfig
from mtd_jax.decoding.draft_vocabulary import DraftVocabulary
from mtd_jax.errors import InputError
from mtd_jax.transformer.losses import Totals
from mtd_jax.transformer.model import Parameters
from mtd_jax.transformer.packed import Packed
from mtd_jax.transformer.stack import Remat
from mtd_jax.typing import Array, Int

ACCURACIES = "accuracies"
"""Where a record keeps what `TokenTree.expected_tokens` asks for: [depth][rank]."""


@dataclasses.dataclass(frozen=True)
class Heads:
    """Trained weights in memory with what belongs to them: what `load_heads` returns."""

    method: str
    options: Mapping[str, Any]
    """Those of the spec, and others that decoding begins with."""
    base: str
    """Fingerprint of the model that they were trained for."""
    weights: Any
    """The pytree that the spec declares, of arrays."""
    record: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    """How they were trained and how good they are; JSON."""
    vocabulary: DraftVocabulary | None = None
    """Tokens that may be drafted; None: all."""

    @property
    def accuracies(self) -> np.ndarray | None:
        """[depth, rank] how often a guess is right (`tree.build_tree`); None: not measured.

        Raises:
          InputError: the record holds something else in their place.
        """
        return accuracies_of(self.record)


def accuracies_of(record: Mapping[str, Any]) -> np.ndarray | None:
    """`Heads.accuracies` of a record alone."""
    found = record.get(ACCURACIES)
    if found is None:
        return None
    try:
        values = np.asarray(found, np.float64)
    except (TypeError, ValueError, OverflowError):
        values = np.zeros(0)
    if values.ndim != 2 or not values.size or not np.isfinite(values).all():
        raise InputError(f"the record of the heads must hold '{ACCURACIES}' as rows of numbers")
    if values.min() < 0 or values.sum(axis=1).max() > 1 + 1e-6:
        raise InputError(f"'{ACCURACIES}' of the heads are no shares that add up to at most 1")
    return values


@dataclasses.dataclass(frozen=True)
class HeadsSpec(abc.ABC):
    """What a method says of its weights; fields of its dataclass are options."""

    name: ClassVar[str]
    """The method's."""

    @property
    @abc.abstractmethod
    def depth(self) -> int:
        """Tokens drafted behind the next one: k."""

    @property
    def vocabulary(self) -> int:
        """So many of the most frequent tokens of the texts are drafted; 0 is all of the base's.

        Where it is not 0, `training_loss` and `guesses` take the keyword `vocabulary`: their ids.
        """
        return 0

    @abc.abstractmethod
    def declare(self, config: ModelConfig) -> Any:
        """Every weight for a base (`parameters.Weight` leaves)."""

    @abc.abstractmethod
    def initial(self, base: Parameters, key: jax.Array) -> Any:
        """Weights before the first step, as `declare` says; may be taken from the base."""

    @abc.abstractmethod
    def counts(self, batch: Packed) -> Totals:
        """What there is to learn in a batch: "loss" among it (`training.objective.Objective`)."""

    @abc.abstractmethod
    def training_loss(
        self,
        weights: Any,
        base: Parameters,
        batch: Packed,
        counts: Totals,
        *,
        chunk: int,
    ) -> tuple[jax.Array, Totals]:
        """The batch's share of the loss and of what is measured; no gradient for the base.

        Args:
          chunk: positions of a row whose logits may exist at a time.
        """

    @abc.abstractmethod
    def guesses(
        self, weights: Any, base: Parameters, batch: Packed, ranks: int, *, chunk: int
    ) -> tuple[Int[Array, "B T"], Int[Array, "B T k ranks"]]:
        """The base's own next token at every position, and what each head guesses behind it.

        Guess (n, i) is for the token i + 2 places behind position n (i from 0), likeliest first.
        """

    @abc.abstractmethod
    def flops(self, config: ModelConfig) -> float:
        """Floating-point operations a token of a training step, attention left out."""


class WholeSpec(HeadsSpec):
    """A spec whose heads may be trained together with the model below them."""

    trunk: Literal["frozen", "trained"]
    """An option. `trained`: all weights learn, by `whole_loss`; there is no base to distil from."""

    @abc.abstractmethod
    def whole_loss(
        self,
        weights: Any,
        params: Parameters,
        batch: Packed,
        counts: Totals,
        *,
        chunk: int,
        remat: Remat,
    ) -> tuple[jax.Array, Totals]:
        """As `training_loss`, with gradients for the model; `remat` is `train_stack`'s."""

    @abc.abstractmethod
    def whole_flops(self, config: ModelConfig) -> float:
        """As `flops`, of the heads and all that is read of the output head, both ways."""
