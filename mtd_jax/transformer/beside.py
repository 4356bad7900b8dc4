"""Rows beside a text: at every place of it a few that nobody sees but the later ones of that place.

Three places of a text, at each of which two rows a and b stand (x sees, . does not):

    keys    text    beside 0   beside 1   beside 2
            0 1 2     a b        a b        a b
    0 a     x . .     x .        . .        . .
      b     x . .     x x        . .        . .
    1 a     x x .     . .        x .        . .
      b     x x .     . .        x x        . .
    2 a     x x x     . .        . .        x .
      b     x x x     . .        . .        x x

Of the square on the right all but its diagonal blocks is empty, so it is never built: a row's
scores are those with the text, and as many more as there are rows at its place.
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from mtd_jax.config import ModelConfig
from mtd_jax.transformer import masks
from mtd_jax.transformer.attention import HIDDEN, in_parts, rows_at_a_time
from mtd_jax.transformer.linear import precision_of
from mtd_jax.transformer.rope import rotary
from mtd_jax.typing import Array, Bool, Float, Int, Leaf


class Beside(struct.PyTreeNode):
    """What the layers must know of rows beside a text: A at each of N places, N A in all."""

    angles: tuple[Float[Array, "B NA half"], Float[Array, "B NA half"]]
    """Cosines and sines of the rows' positions."""
    positions: Leaf
    """[B, N, A] int32"""
    mask: Leaf
    """[B, N, S] bool: the keys of the text that a place sees where no sliding window applies."""
    keys: Leaf
    """[B, S] int32: positions of those keys."""
    own: Leaf
    """[A, A] bool: which rows (columns) of its place a row sees."""

    @classmethod
    def at(
        cls,
        config: ModelConfig,
        places: Int[Array, "B N"],
        ahead: tuple[int, ...],
        own: Bool[np.ndarray, "A A"],
        mask: Bool[Array, "B N S"],
        keys: Int[Array, "B S"],
    ) -> Beside:
        """Rows that stand so many positions `ahead` of the `places`; each sees its place's keys."""
        positions = places[:, :, None] + jnp.asarray(ahead, jnp.int32)[None, None, :]
        flat = positions.reshape(positions.shape[0], -1)
        # Each row is computed in the text up to itself, as when it is decoded (`rope.rotary`).
        angles = rotary(config, flat, flat + 1)
        return cls(angles=angles, positions=positions, mask=mask, keys=keys, own=jnp.asarray(own))


def attend_beside(
    q: Float[Array, "B NA K G H"],
    text: tuple[Float[Array, "B K H S"], Float[Array, "B K S H"]],
    own: tuple[Float[Array, "B NA K H"], Float[Array, "B NA K H"]],
    rows: Beside,
    *,
    window: Int[Array, ""] | None = None,
    softcap: float | None = None,
) -> Float[Array, "B NA K G H"]:
    """Attention of rows beside a text to it and to each other: one softmax over both.

    Scores exist for a part of the places at a time (`attention.in_parts`).

    Args:
      text: keys and values of the text.
      own: keys and values of the rows themselves.
      window: positions that a row sees, its own among them; None is all.
    """
    batch, places, beside = rows.positions.shape

    def by_place(x: jax.Array) -> jax.Array:
        return x.reshape(batch, places, beside, *x.shape[2:])

    def part(rows_of: tuple[jax.Array, ...]) -> jax.Array:
        q, own_k, own_v, positions, mask = rows_of
        seen = jnp.broadcast_to(mask[:, :, None, :], (*positions.shape, mask.shape[-1]))
        near = jnp.broadcast_to(rows.own[None, None], (*positions.shape, beside))
        if window is not None:
            flat = positions.reshape(batch, -1)
            seen &= masks.within_window(flat, rows.keys, window).reshape(seen.shape)
            near &= positions[:, :, None, :] > positions[:, :, :, None] - window
        return _attend(q, *text, own_k, own_v, seen, near, softcap)

    arrays = (by_place(q), by_place(own[0]), by_place(own[1]), rows.positions, rows.mask)
    size = rows_at_a_time(q, text[0].shape[-1], each=beside)
    return in_parts(part, arrays, size).reshape(q.shape)


def _attend(
    q: Float[Array, "B N A K G H"],
    k: Float[Array, "B K H S"],
    v: Float[Array, "B K S H"],
    own_k: Float[Array, "B N A K H"],
    own_v: Float[Array, "B N A K H"],
    seen: Bool[Array, "B N A S"],
    near: Bool[Array, "B N A A"],
    softcap: float | None,
) -> Float[Array, "B N A K G H"]:
    batch, places, beside, kv_heads, group, width = q.shape
    precision = precision_of(q)
    flat = q.transpose(0, 3, 1, 2, 4, 5).reshape(batch, kv_heads, -1, width)
    scores = jnp.einsum(
        "BKRH,BKHS->BKRS", flat, k, precision=precision, preferred_element_type=jnp.float32
    )
    scores = scores.reshape(batch, kv_heads, places, beside, group, -1)
    # Not a product of matrices: of so few rows and columns each would be a call of its own.
    wide = (batch, kv_heads, places, beside, group)
    pairs = q[:, :, :, None].astype(jnp.float32) * own_k[:, :, None, :, :, None].astype(jnp.float32)
    to_own = pairs.sum(axis=-1).transpose(0, 4, 1, 2, 5, 3)
    scores = jnp.concatenate([scores, to_own], axis=-1) * jnp.float32(1 / math.sqrt(width))
    if softcap is not None:
        scores = softcap * jnp.tanh(scores / softcap)
    mask = jnp.concatenate([seen, near], axis=-1)[:, None, :, :, None, :]
    weights = jax.nn.softmax(jnp.where(mask, scores, jnp.float32(HIDDEN)), axis=-1).astype(v.dtype)
    keys = k.shape[-1]
    from_text = weights[..., :keys].reshape(batch, kv_heads, -1, keys)
    out = jnp.einsum("BKRS,BKSH->BKRH", from_text, v, precision=precision).reshape(*wide, width)
    # [B, K, N, A, G, A, H] summed over the rows of the place.
    values = own_v.transpose(0, 3, 1, 2, 4)[:, :, :, None, None]
    out = out + (weights[..., keys:, None] * values).sum(axis=-2)
    return out.transpose(0, 2, 3, 1, 4, 5)
