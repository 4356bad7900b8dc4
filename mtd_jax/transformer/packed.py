"""Rows of several documents, as training sees them."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import struct

from mtd_jax.config import ModelConfig
from mtd_jax.transformer import masks
from mtd_jax.transformer.model import Parameters, embed
from mtd_jax.transformer.stack import Remat, Rows, rows_at, train_stack
from mtd_jax.typing import Array, Bool, Float, Int, Leaf


class Packed(struct.PyTreeNode):
    """A batch of rows; documents lie one behind another and know nothing of each other.

    Two documents of three and two tokens in a row of six:

        tokens     a b c d e 0
        segments   1 1 1 2 2 0
        positions  0 1 2 0 1 0
    """

    tokens: Leaf
    """[B, T] int32"""
    segments: Leaf
    """[B, T] int32: number of the document within its row, from 1; 0 is padding."""
    positions: Leaf
    """[B, T] int32: place in the document, from 0."""
    answer: Leaf
    """[B, T] bool: what the assistant wrote; in plain text, everything."""
    learn: Leaf
    """[B, T] bool: tokens that are to be predicted. Never a document's first."""

    def targets(self, ahead: int = 1) -> tuple[Int[Array, "B T"], Bool[Array, "B T"]]:
        """The token `ahead` places on, and whether a row is to learn it.

        It is not, where it lies in another document or behind the row's end.
        """
        same = (self.segments == shifted(self.segments, ahead)) & (self.segments > 0)
        return shifted(self.tokens, ahead), shifted(self.learn, ahead) & same


def shifted(x: Array, by: int) -> Array:
    """Of an array [B, T, ...]: at every position what stands `by` places on; 0 behind the end."""
    return jnp.pad(x[:, by:], [(0, 0), (0, min(by, x.shape[1]))] + [(0, 0)] * (x.ndim - 2))


def delayed(x: Array, by: int) -> Array:
    """Of an array [B, T, ...]: at every position what stands `by` places before; 0 at the start."""
    length = x.shape[1]
    kept = x[:, : max(0, length - by)]
    return jnp.pad(kept, [(0, 0), (min(by, length), 0)] + [(0, 0)] * (x.ndim - 2))


def unpacked(
    tokens: Int[Array, "B T"], prompts: Int[Array, " B"], lengths: Int[Array, " B"]
) -> Packed:
    """Rows of one text each: so many tokens are the prompt's, the answer ends at the length."""
    order = jnp.broadcast_to(jnp.arange(tokens.shape[1], dtype=jnp.int32)[None, :], tokens.shape)
    inside = order < lengths[:, None]
    answer = inside & (order >= prompts[:, None])
    return Packed(tokens, inside.astype(jnp.int32), order, answer, answer)


def packed_rows(config: ModelConfig, batch: Packed) -> Rows:
    """Positions and masks: causal within each document."""
    order = jnp.broadcast_to(
        jnp.arange(batch.tokens.shape[1], dtype=jnp.int32)[None, :], batch.tokens.shape
    )
    same = batch.segments[:, :, None] == batch.segments[:, None, :]
    # Each row is computed in the text up to itself, as when it is decoded (`rope.rotary`).
    context = batch.positions + 1
    mask = masks.causal(order, order) & same
    return rows_at(config, batch.positions, batch.positions, mask, context)


def packed_hidden(
    params: Parameters, batch: Packed, *, remat: Remat = "none"
) -> Float[Array, "B T D"]:
    """What the last layer puts out, before the final norm, at every position."""
    config, x = params.config, embed(params, batch.tokens)
    rows = packed_rows(config, batch)
    return train_stack(config, params.blocks, x, rows=rows, remat=remat)[0]


def frozen_rows(params: Parameters, batch: Packed) -> Float[Array, "B T D"]:
    """`packed_hidden` for heads that are trained on it.

    Nothing of the layers is differentiated, so nothing of them is stored.
    """
    return jax.lax.stop_gradient(packed_hidden(jax.lax.stop_gradient(params), batch))
