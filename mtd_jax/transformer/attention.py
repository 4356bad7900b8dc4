"""Grouped-query attention over keys that lie in a cache or in the sequence itself."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from mtd_jax.kernels import few_rows
from mtd_jax.sharding import parts
from mtd_jax.transformer.cache import KVCache
from mtd_jax.transformer.linear import precision_of
from mtd_jax.typing import Array, Bool, Float, Int

# Large enough that exp() of it is zero after the row maximum is subtracted, and finite, so that a
# row which sees nothing (an unused cache row) gives numbers and no NaN.
HIDDEN = -1e30
"""The score of a key that a row does not see."""
_PART, _SMALLEST_PART = 512, 32
_SCORES = 2**25
"""Bytes of scores that a device holds at a time: they stay on a TPU's chip between two products,
and three quarters of a step's traffic with the memory is saved."""


def attend(
    q: Float[Array, "B T K G H"],
    k: Float[Array, "B K H S"],
    v: Float[Array, "B K S H"],
    mask: Bool[Array, "B T S"],
    *,
    softcap: float | None = None,
) -> Float[Array, "B T K G H"]:
    """softmax(q k^T / sqrt(H)) v with G query heads to a key head; scores in float32.

    The G query heads of one key head are rows of one matrix product, so keys and values are read
    once and never repeated. Both products are plain [rows, H] @ [H, S] and [rows, S] @ [S, H] with
    keys and values as they lie in the cache: any other order makes XLA transpose the cache.
    """
    batch, rows, kv_heads, group, width = q.shape
    precision = precision_of(q)
    q = q.transpose(0, 2, 1, 3, 4).reshape(batch, kv_heads, rows * group, width)
    scores = jnp.einsum(
        "BKRH,BKHS->BKRS", q, k, precision=precision, preferred_element_type=jnp.float32
    )
    scores = scores * jnp.float32(1 / math.sqrt(width))
    if softcap is not None:
        scores = softcap * jnp.tanh(scores / softcap)
    scores = scores.reshape(batch, kv_heads, rows, group, -1)
    scores = jnp.where(mask[:, None, :, None, :], scores, jnp.float32(HIDDEN))
    weights = jax.nn.softmax(scores, axis=-1).astype(v.dtype)
    weights = weights.reshape(batch, kv_heads, rows * group, -1)
    out = jnp.einsum("BKRS,BKSH->BKRH", weights, v, precision=precision)
    return out.reshape(batch, kv_heads, rows, group, width).transpose(0, 2, 1, 3, 4)


def attend_cached(
    q: Float[Array, "B T K G H"],
    cache: KVCache,
    layer: Int[Array, ""],
    mask: Bool[Array, "B T S"],
    *,
    softcap: float | None = None,
) -> Float[Array, "B T K G H"]:
    """`attend` with one layer's keys and values of a cache.

    Few rows on a CPU have a kernel of the package's own (`kernels/few_rows.py`).
    """
    if softcap is None and few_rows.attends(q, cache.k, cache.v):
        return _by_kernel(q, cache, layer, mask)
    return attend(q, *cache.layer(layer), mask, softcap=softcap)


@jax.custom_jvp
def _by_kernel(q: jax.Array, cache: KVCache, layer: jax.Array, mask: jax.Array) -> jax.Array:
    return few_rows.attend(q, cache.k, cache.v, layer, mask)


@_by_kernel.defjvp
def _by_kernel_jvp(primals: tuple[Any, ...], tangents: tuple[Any, ...]) -> tuple[Any, Any]:
    """The tangent of what the kernel computes, by XLA."""

    def plain(q: jax.Array, cache: KVCache, layer: jax.Array, mask: jax.Array) -> jax.Array:
        return attend(q, *cache.layer(layer), mask)

    return _by_kernel(*primals), jax.jvp(plain, primals, tangents)[1]


def attend_in_parts(
    q: Float[Array, "B T K G H"],
    k: Float[Array, "B K H S"],
    v: Float[Array, "B K S H"],
    mask: Bool[Array, "B T S"],
    *,
    softcap: float | None = None,
) -> Float[Array, "B T K G H"]:
    """`attend` for whole sequences: scores exist for a part of the rows at a time.

    All at once they take 4 N T S bytes a sequence, 2 GB for 32 heads and 4096 tokens. The backward
    pass makes each part's scores again. On a mesh each device's share decides the part's size.
    """

    def part(rows: tuple[jax.Array, ...]) -> jax.Array:
        return attend(rows[0], k, v, rows[1], softcap=softcap)

    return in_parts(part, (q, mask), rows_at_a_time(q, k.shape[-1]))


def in_parts(
    attention: Callable[[tuple[jax.Array, ...]], jax.Array], rows: tuple[jax.Array, ...], size: int
) -> jax.Array:
    """`attention(rows)` for arrays [B, T, ...], of which `size` rows are looked at at a time."""
    batch, length = rows[0].shape[:2]
    while length % size and size > _SMALLEST_PART:
        size //= 2
    if length <= size or length % size:
        return attention(rows)

    def split(x: jax.Array) -> jax.Array:
        return x.reshape(batch, -1, size, *x.shape[2:]).swapaxes(0, 1)

    found = jax.lax.map(jax.checkpoint(attention), jax.tree.map(split, rows)).swapaxes(0, 1)
    return found.reshape(batch, length, *found.shape[3:])


def rows_at_a_time(q: Float[Array, "B T K G H"], keys: int, each: int = 1) -> int:
    """Rows whose scores fit `_SCORES` on each device, within bounds that keep products large.

    `each` rows of `q` count as one.
    """
    batch, _, kv_heads, group, _ = q.shape
    heads = kv_heads * group // math.gcd(kv_heads, parts("kv_heads"))
    row = 4 * each * max(1, batch // parts("batch")) * heads * keys
    size = _PART
    while size > _SMALLEST_PART and size * row > _SCORES:
        size //= 2
    return size
