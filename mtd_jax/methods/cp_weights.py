"""Weights of CP heads, and the tables of probabilities that they make of a row."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import struct

from mtd_jax.transformer.linear import contract
from mtd_jax.transformer.model import Parameters, capped, project
from mtd_jax.typing import Array, Float


class CPWeights(struct.PyTreeNode):
    """What is trained. r experts with a head for each of n steps."""

    gate: Any
    """[D, r]: A."""
    down: Any = None
    """[D, r, n, D]: V; or of low rank, its first factor [D, r, n, k]. One wide product makes the
    rows of all heads, as in `medusa.MedusaWeights`."""
    up: Any = None
    """[r, n, k, D]: the second factor."""
    output: Any = None
    """[r, n, D, V]: output matrices of the heads' own, where they do not share the base's."""

    def log_w(self, e: Float[Array, "*rows D"]) -> Float[Array, "*rows r"]:
        """Log-weights of the experts."""
        logits = _float32("...D,Dr->...r", e, self.gate)
        return jax.nn.log_softmax(logits, axis=-1)

    def log_p(self, base: Parameters, e: Float[Array, "*rows D"]) -> Float[Array, "*rows r n V"]:
        """Tables of all heads; the base's output head is read once for all of them.

        Args:
          e: what the last layer puts out, behind the final norm.
        """
        if self.output is not None:
            logits = _float32("...D,rnDV->...rnV", e, self.output)
            return jax.nn.log_softmax(capped(base.config, logits), axis=-1)
        width, rank, steps, inner = self.down.shape
        moved = contract("...D,DE->...E", e, self.down.astype(e.dtype).reshape(width, -1))
        moved = moved.reshape(*e.shape[:-1], rank, steps, inner)
        if self.up is not None:
            moved = contract("...rnk,rnkD->...rnD", moved, self.up.astype(e.dtype))
        return jax.nn.log_softmax(project(base, e[..., None, None, :] + moved), axis=-1)

    def first(self, steps: int) -> CPWeights:
        """The heads of the first `steps` steps."""

        def cut(x: Any, axis: int) -> Any:
            return None if x is None else jax.lax.slice_in_dim(x, 0, steps, axis=axis)

        return CPWeights(self.gate, cut(self.down, 2), cut(self.up, 1), cut(self.output, 1))

    def by_step(self) -> CPWeights:
        """The same with a leading axis n; each slice of it has the heads of one step."""

        def split(x: Any, axis: int) -> Any:
            return None if x is None else jnp.expand_dims(jnp.moveaxis(x, axis, 0), axis + 1)

        steps = next(
            x.shape[axis] for x, axis in ((self.down, 2), (self.output, 1)) if x is not None
        )
        gate = jnp.broadcast_to(self.gate, (steps, *self.gate.shape))
        return CPWeights(gate, split(self.down, 2), split(self.up, 1), split(self.output, 1))


def _float32(equation: str, x: jax.Array, weight: jax.Array) -> jax.Array:
    """A product whose result is a float32 logit, whatever the rows are."""
    return contract(equation, x, weight.astype(x.dtype), jnp.float32)
