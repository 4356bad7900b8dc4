"""How well a model says texts that it has not seen: loss, perplexity, and what a method keeps.

The forward pass is the one that training uses, in the cycles that the method decodes in; so figures
are exact means over every token, and nothing is sampled.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mtd_jax import sharding
from mtd_jax.config import CycleConfig
from mtd_jax.decoding.language_model import LanguageModel
from mtd_jax.decoding.method import Method
from mtd_jax.evaluation.forward import cycles_of, decoded_hidden
from mtd_jax.methods.cycles import kinds_of_places, place_names, places_in_cycle
from mtd_jax.training.config import DataConfig
from mtd_jax.training.data import prepare
from mtd_jax.training.rows import Rows
from mtd_jax.transformer.losses import Totals, cross_entropy
from mtd_jax.transformer.model import Parameters
from mtd_jax.transformer.packed import Packed

_CHUNK = 1024
"""Positions whose logits a device holds at a time, over all its rows."""


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
    cycles = cycles_of(method, model.config)
    told_apart = cycles if places_of is None else cycles_of(places_of, model.config)
    totals: dict[str, float] = {}
    size = -(-batch_size // model.batch_multiple) * model.batch_multiple
    with model.on_mesh():
        for first in range(0, len(rows), size):
            part = [rows[i] for i in range(first, min(first + size, len(rows)))]
            part += [rows.empty()] * (size - len(part))
            batch: Packed = jax.tree.map(lambda *x: jnp.asarray(np.stack(x)), *part)
            found = jax.device_get(_sums(model.params, batch, cycles, told_apart))
            totals = {name: totals.get(name, 0.0) + float(x) for name, x in found.items()}
            progress()
    tokens = max(totals["tokens"], 1.0)
    names = () if told_apart is None else place_names(told_apart.cycle, told_apart.anchor)
    return TextLoss(
        tokens=int(totals["tokens"]),
        loss=totals["loss"] / tokens,
        accuracy=totals["right"] / tokens,
        by_place={
            n: totals[f"loss_{n}"] / totals[f"tokens_{n}"] for n in names if totals[f"tokens_{n}"]
        },
    )


@functools.partial(jax.jit, static_argnums=(2, 3))
def _sums(
    params: Parameters, batch: Packed, cycles: CycleConfig | None, told_apart: CycleConfig | None
) -> Totals:
    """Tokens, their losses and right guesses; tokens and losses of every place of `told_apart`."""
    targets, wanted = batch.targets()
    x = decoded_hidden(params, batch, cycles)
    chunk = max(1, _CHUNK // max(1, x.shape[0] // sharding.parts("batch")))
    kinds: jax.Array = jnp.zeros_like(targets)
    names: tuple[str, ...] = ()
    if told_apart is not None:
        names = place_names(told_apart.cycle, told_apart.anchor)
        places = places_in_cycle(batch, told_apart.cycle, told_apart.anchor)
        kinds = kinds_of_places(places, told_apart.cycle)
    found = cross_entropy(params, x, targets, wanted, chunk=chunk, kinds=kinds, names=names)
    alone = {f"tokens_{n}": (wanted & (kinds == i)).sum() for i, n in enumerate(names)}
    return {**found, "tokens": wanted.sum(), **alone}
