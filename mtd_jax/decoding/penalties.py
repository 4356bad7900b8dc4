"""Penalties on tokens that the text holds already, at every node of a tree of drafts.

Each node sees the text and the drafts on its own way, accepted or not yet, so a penalty is exactly
as strong as when tokens are decoded one at a time.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import struct

from mtd_jax.decoding.sampling import SamplingRows
from mtd_jax.typing import Array, Float, Int, Leaf


class History(struct.PyTreeNode):
    """The text of every row so far."""

    text: Leaf
    """[B, C] int32: prompt and answer, one token behind the other."""
    length: Leaf
    """[B] int32: tokens of it that count."""
    prompt: Leaf
    """[B] int32: how many of them are the prompt's."""


def penalized(
    logits: Float[Array, "B M V"],
    rows: SamplingRows,
    history: History,
    drafts: Int[Array, "B M P"] | None = None,
) -> Float[Array, "B M V"]:
    """Logits less the penalties of each row; untouched where no row asks for any.

    The repetition penalty (arXiv 1909.05858) looks at prompt and answer, presence and frequency at
    the answer only.

    Args:
      drafts: for every node the drafts on its way, itself included; -1 is none.
    """
    asked = (
        (rows.repetition_penalty != 1.0)
        | (rows.presence_penalty != 0.0)
        | (rows.frequency_penalty != 0.0)
    )
    return jax.lax.cond(
        jnp.any(asked),
        lambda: _penalized(logits, rows, history, drafts),
        lambda: logits,
    )


def _penalized(
    logits: jax.Array, rows: SamplingRows, history: History, drafts: jax.Array | None
) -> jax.Array:
    batch, nodes, vocab = logits.shape
    index = jnp.arange(history.text.shape[1], dtype=jnp.int32)[None, :]
    known = index < history.length[:, None]
    row = jnp.arange(batch, dtype=jnp.int32)[:, None]
    zeros = jnp.zeros((batch, vocab), jnp.int32)
    in_text = zeros.at[row, history.text].add(known.astype(jnp.int32), mode="drop")
    new = known & (index >= history.prompt[:, None])
    generated = zeros.at[row, history.text].add(new.astype(jnp.int32), mode="drop")
    in_text, generated = in_text[:, None, :], generated[:, None, :]
    if drafts is not None:
        node = jnp.arange(nodes, dtype=jnp.int32)[None, :, None]
        # Out of range is dropped; -1 would count from the end.
        place = jnp.where(drafts >= 0, drafts, vocab)
        on_way = jnp.zeros(logits.shape, jnp.int32)
        on_way = on_way.at[row[:, :, None], node, place].add(1, mode="drop")
        in_text, generated = in_text + on_way, generated + on_way
    repetition = rows.repetition_penalty[:, None, None]
    weakened = jnp.where(logits > 0, logits / repetition, logits * repetition)
    logits = jnp.where(in_text > 0, weakened, logits)
    presence = rows.presence_penalty[:, None, None] * (generated > 0).astype(jnp.float32)
    frequency = rows.frequency_penalty[:, None, None] * generated.astype(jnp.float32)
    return logits - presence - frequency
