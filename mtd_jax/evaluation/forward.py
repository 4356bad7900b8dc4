"""Whole texts through the model as a method decodes them, in one pass."""

from __future__ import annotations

import dataclasses

from mtd_jax.config import CycleConfig, ModelConfig
from mtd_jax.decoding.method import Method
from mtd_jax.methods.cycles import cycle_hidden, places_in_cycle
from mtd_jax.methods.dmtd import DMTD
from mtd_jax.transformer.model import Parameters
from mtd_jax.transformer.packed import Packed, packed_hidden
from mtd_jax.typing import Array, Float


def cycles_of(method: Method, config: ModelConfig) -> CycleConfig | None:
    """The cycles whose model a method's tokens are those of; None: plain decoding's.

    Lossless cycles emit what cycles of one do.
    """
    if not isinstance(method, DMTD):
        return None
    groups = method.groups(config)
    return dataclasses.replace(groups, cycle=1) if method.lossless else groups


def decoded_hidden(
    params: Parameters, batch: Packed, cycles: CycleConfig | None
) -> Float[Array, "B T D"]:
    """What the last layer puts out at every position, before the final norm."""
    if cycles is None:
        return packed_hidden(params, batch)
    places = places_in_cycle(batch, cycles.cycle, cycles.anchor)
    return cycle_hidden(params, batch, places, early=cycles.early, late=cycles.late)
