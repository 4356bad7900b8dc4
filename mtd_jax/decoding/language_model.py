"""A loaded model: what `load` returns and `generate` takes."""

from __future__ import annotations

import contextlib
import dataclasses

import jax
from jax.sharding import Mesh

from mtd_jax.config import ModelConfig
from mtd_jax.tokenizer import Tokenizer
from mtd_jax.transformer.model import Parameters


@dataclasses.dataclass(frozen=True)
class LanguageModel:
    """Parameters with what belongs to them."""

    params: Parameters
    """On the devices they will be used on; sharded where `mesh` is given."""
    tokenizer: Tokenizer | None
    """None for a checkpoint without one: it then takes and gives token ids."""
    mesh: Mesh | None
    fingerprint: str
    """Identifies config and weights, so that heads find the base they were trained for."""
    source: str
    """Where the weights came from, in words."""

    @property
    def config(self) -> ModelConfig:
        """What the model is."""
        return self.params.config

    @property
    def eos_token_ids(self) -> tuple[int, ...]:
        """The tokens that end an answer: the config's; if it names none, the tokenizer's."""
        if self.config.eos_token_ids or self.tokenizer is None:
            return self.config.eos_token_ids
        return self.tokenizer.eos_token_ids

    @property
    def batch_multiple(self) -> int:
        """Batches are filled up to a multiple of this, so that the mesh divides them."""
        return 1 if self.mesh is None else self.mesh.shape["data"] * self.mesh.shape["fsdp"]

    def on_mesh(self) -> contextlib.AbstractContextManager[object]:
        """Programs that run inside are spread over the model's mesh, if it has one."""
        return contextlib.nullcontext() if self.mesh is None else jax.set_mesh(self.mesh)
