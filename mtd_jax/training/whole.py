"""Training of heads together with the model below them, whatever weights that begins with."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax

from mtd_jax.decoding.heads import WholeSpec
from mtd_jax.decoding.method import Method
from mtd_jax.training.heads import HeadsTraining
from mtd_jax.training.utilization import weights_in_products
from mtd_jax.transformer.losses import Totals
from mtd_jax.transformer.model import Parameters
from mtd_jax.transformer.packed import Packed
from mtd_jax.transformer.stack import Remat


@dataclasses.dataclass(frozen=True)
class WholeTraining(HeadsTraining):
    """The objective of heads with `trunk = "trained"`: all weights, from what the spec says."""

    spec: WholeSpec
    remat: Remat = "layer"

    def split(self, params: Parameters) -> tuple[Any, Any]:
        """(model, new heads), and nothing that stays."""
        heads, params = super().split(params)
        return (params, heads), ()

    def loss(
        self, trainable: Any, frozen: Any, batch: Packed, counts: Totals, key: jax.Array | None
    ) -> tuple[jax.Array, Totals]:
        """The spec's, with gradients for the trunk."""
        del frozen, key
        params, heads = trainable
        chunk = self.chunk_of(batch)
        return self.spec.whole_loss(heads, params, batch, counts, chunk=chunk, remat=self.remat)

    def flops(self, trainable: Any, frozen: Any) -> float:
        """Layers and heads both ways; the output head as often as there are heads."""
        params, _ = trainable
        output = params.config.hidden_size * params.config.vocab_size
        layers = weights_in_products(params) - output
        return 6.0 * layers + self.spec.whole_flops(params.config)

    def decoder(self, trainable: Any, frozen: Any) -> tuple[Parameters, Method]:
        """The model and the method."""
        params, heads = trainable
        return super().decoder(heads, params)
