"""Reading prompts into the cache."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from mtd_jax import backend
from mtd_jax.decoding.method import DecodeState, Extend, Output, Requests, Tally
from mtd_jax.decoding.penalties import History, penalized
from mtd_jax.decoding.sampling import sample
from mtd_jax.transformer.cache import KVCache
from mtd_jax.transformer.model import Parameters, extend, unembed
from mtd_jax.typing import Array, Float, Int

CHUNK = 512
"""Prompt rows that pass the model at once: enough to be bound by arithmetic, few enough that the
scores [B, N, CHUNK, S] of one layer stay small whatever the prompt's length."""

_CHUNK_ALONE = 64
"""The same where prompts are read one after another (`backend.reads_prompts_alone`)."""

_SMALLEST_BUCKET = 16


def bucket_prompt(length: int) -> int:
    """The padded length for prompts of `length`: a power of two up to CHUNK, then whole chunks."""
    size = _SMALLEST_BUCKET
    while size < min(length, CHUNK):
        size *= 2
    return size if length <= CHUNK else -(-length // CHUNK) * CHUNK


def read_prompt(
    params: Parameters,
    tokens: Int[Array, "B P"],
    lengths: Int[Array, " B"],
    capacity: int,
    extend: Extend = extend,
    width: int | None = None,
    **by_row: Array,
) -> tuple[Float[Array, "B W"], KVCache]:
    """Runs the prompts through the model, a chunk at a time.

    Chunks beyond the longest prompt are not run, so a bucket costs no more than what is in it. On a
    CPU a batch costs no more than its prompts one by one.

    Args:
      extend: how rows pass the layers: `model.extend`, or what a method has in its place.
      width: of the rows that it puts out; None is the model's.
      by_row: arrays [B, ...] that it takes beside the others.

    Returns:
      what `extend` put out at each prompt's last token, and the cache holding `lengths` tokens.
    """
    batch, padded = tokens.shape
    if padded > capacity:
        raise ValueError(f"a prompt of {padded} rows does not fit a cache of {capacity} slots")
    # On a mesh the rows lie on different devices, which read theirs at the same time.
    alone = backend.reads_prompts_alone() and jax.sharding.get_abstract_mesh().empty
    size = min(padded, _CHUNK_ALONE if alone else CHUNK)
    # Whole chunks only: a slice that sticks out would be clamped and read other tokens.
    tokens = jnp.pad(tokens, ((0, 0), (0, -padded % size)))
    cache = KVCache.empty(params.config, batch, capacity, params.embedding.dtype)
    last = jnp.zeros((batch, width or params.config.hidden_size), params.embedding.dtype)
    if not alone or batch == 1:
        last, cache = _read_chunks(params, cache, last, tokens, lengths, size, extend, by_row)
        return last, cache.replace(length=lengths)

    def read(b: jax.Array, carry: tuple[jax.Array, KVCache]) -> tuple[jax.Array, KVCache]:
        last, cache = carry

        def row(x: jax.Array, axis: int = 0) -> jax.Array:
            return jax.lax.dynamic_slice_in_dim(x, b, 1, axis)

        mine = KVCache(k=row(cache.k, 1), v=row(cache.v, 1), length=row(cache.length))
        others = {name: row(x) for name, x in by_row.items()}
        found, mine = _read_chunks(
            params, mine, row(last), row(tokens), row(lengths), size, extend, others
        )
        place = jax.lax.dynamic_update_slice_in_dim
        cache = cache.replace(k=place(cache.k, mine.k, b, 1), v=place(cache.v, mine.v, b, 1))
        return place(last, found, b, 0), cache

    last, cache = jax.lax.fori_loop(jnp.int32(0), jnp.int32(batch), read, (last, cache))
    return last, cache.replace(length=lengths)


def _read_chunks(
    params: Parameters,
    cache: KVCache,
    last: Float[Array, "B W"],
    tokens: Int[Array, "B P"],
    lengths: Int[Array, " B"],
    size: int,
    extend: Extend,
    by_row: Mapping[str, Array],
) -> tuple[Float[Array, "B W"], KVCache]:
    """`read_prompt` for rows side by side, `size` of their tokens at a time."""
    batch = tokens.shape[0]
    context = jnp.broadcast_to(lengths[:, None], (batch, size))

    def read(i: jax.Array, carry: tuple[jax.Array, KVCache]) -> tuple[jax.Array, KVCache]:
        last, cache = carry
        start = i * size
        chunk = jax.lax.dynamic_slice_in_dim(tokens, start, size, axis=1)
        cache = cache.replace(length=jnp.full(batch, start, jnp.int32))
        x, cache = extend(params, cache, chunk, context=context, **by_row)
        row = lengths - 1 - start
        here = (row >= 0) & (row < size)
        found = jnp.take_along_axis(x, jnp.clip(row, 0, size - 1)[:, None, None], axis=1)[:, 0]
        return jnp.where(here[:, None], found, last), cache

    chunks = (jnp.max(lengths) + size - 1) // size
    return jax.lax.fori_loop(jnp.int32(0), chunks, read, (last, cache))


def first_state(
    params: Parameters,
    last: Float[Array, "B D"],
    cache: KVCache,
    tokens: Int[Array, "B P"],
    requests: Requests,
    max_emit: int,
    extra: Any = None,
    output: Output = unembed,
) -> DecodeState:
    """The state after prompts that `read_prompt` has read: draws the first new token of each."""
    batch, padded = tokens.shape
    text = jnp.pad(tokens, ((0, 0), (0, cache.capacity + 1 - padded)))
    history = History(text, cache.length, cache.length)
    logits = penalized(output(params, last)[:, None], requests.sampling, history)[:, 0]
    token = sample(logits, requests.sampling, cache.length)
    active = requests.budget > 0
    return DecodeState(
        cache=cache,
        text=text,
        prompt_length=cache.length,
        pending=token,
        emitted=jnp.zeros((batch, max_emit), jnp.int32).at[:, 0].set(token),
        emitted_count=active.astype(jnp.int32),
        partial=jnp.zeros(batch, jnp.int32),
        drafted=jnp.zeros(batch, jnp.int32),
        tally=Tally.empty(batch, max_emit),
        active=active,
        requests=requests,
        extra=extra,
    )
