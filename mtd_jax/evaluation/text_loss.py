"""How well a model says texts that it has not seen: loss, perplexity, and what a method keeps.

The forward pass is the one that training uses, in the cycles that the method decodes in; so figures
are exact means over every token, and nothing is sampled.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np

from mtd_jax.decoding.language_model import LanguageModel
from mtd_jax.decoding.method import Method
from mtd_jax.methods.dmtd import DMTD, PLAIN
from mtd_jax.training.config import DataConfig
from mtd_jax.training.data import prepare
from mtd_jax.training.objective import CycleTuning, FineTuning, Objective
from mtd_jax.training.rows import Rows
from mtd_jax.transformer.model import Parameters
from mtd_jax.transformer.packed import Packed


@dataclasses.dataclass(frozen=True)
class TextLoss:
    """Means over the tokens that count, each the same."""

    tokens: int
    loss: float
    """Nats a token."""
    accuracy: float
    """Share of tokens that were the likeliest."""
    by_place: dict[str, float]
    """Loss of what each place in a cycle predicts: `1` a head, `2`.. late layers only, `plain` rows
    outside of cycles (a prompt's last one, or all of it where it counts); empty without cycles."""

    @property
    def perplexity(self) -> float:
        """Of a token: exp(loss)."""
        return math.exp(min(self.loss, 700.0))

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready values."""
        return {**dataclasses.asdict(self), "perplexity": self.perplexity}


def text_rows(model: LanguageModel, data: DataConfig, cache: Path) -> Rows:
    """The rows of the texts in `data.train`.

    Raises:
      InputError: as for `training.data.prepare`.
    """
    return prepare(data, model.tokenizer, model.config, seed=0, cache=cache).train


def text_loss(
    model: LanguageModel,
    method: Method,
    rows: Rows,
    *,
    batch_size: int,
    places_of: Method | None = None,
    progress: Callable[[], None] = lambda: None,
) -> TextLoss:
    """The loss of a model on rows of text, as `method` decodes.

    A lossless method has the loss of the model itself.

    Args:
      places_of: a method in whose cycles' places the loss is told apart, though the model has none:
        places differ in their tokens, so only like places can be compared.
      progress: is called behind every batch.
    """
    objective = _objective(model, method, places_of)
    measure = jax.jit(objective.loss)
    nothing = jax.tree.map(lambda _: None, model.params)
    totals: dict[str, float] = {}
    counts: dict[str, float] = {}
    size = -(-batch_size // model.batch_multiple) * model.batch_multiple
    with model.on_mesh():
        for first in range(0, len(rows), size):
            part = [rows[i] for i in range(first, min(first + size, len(rows)))]
            part += [rows.empty()] * (size - len(part))
            batch: Packed = jax.tree.map(lambda *x: np.stack(x), *part)
            batch = jax.tree.map(jax.numpy.asarray, batch)
            here = objective.counts(batch)
            # Divided by one: sums, which add up.
            ones = jax.tree.map(jax.numpy.ones_like, here)
            _, found = measure(model.params, nothing, batch, ones, jax.random.key(0))
            for target, new in ((totals, found), (counts, here)):
                for name, value in jax.device_get(new).items():
                    target[name] = target.get(name, 0.0) + float(value)
            progress()
    places = {n: totals[f"loss_{n}"] / counts[n] for n in counts if n != "loss" and counts[n]}
    number = max(counts["loss"], 1.0)
    return TextLoss(
        tokens=int(counts["loss"]),
        loss=totals["loss"] / number,
        accuracy=totals["accuracy"] / number,
        by_place=places,
    )


@dataclasses.dataclass(frozen=True)
class _PlainByPlace(CycleTuning):
    """The loss of a plain decoder, at each place of cycles that it does not have."""

    def _forward(self, params: Parameters, batch: Packed, places: jax.Array) -> jax.Array:
        return super()._forward(params, batch, jax.numpy.full_like(places, PLAIN))


def _objective(model: LanguageModel, method: Method, places_of: Method | None) -> Objective:
    cyclic = method if isinstance(method, DMTD) else places_of
    if not isinstance(cyclic, DMTD):
        return FineTuning()
    groups = cyclic.groups(model.config)
    assert groups.anchor is not None  # `groups` knows it
    kind = CycleTuning if cyclic is method else _PlainByPlace
    return kind(
        cycle=1 if cyclic.lossless else groups.cycle,
        early=groups.early,
        late=groups.late,
        anchor=groups.anchor,
    )
