"""The whole decoder: parameters, embedding and output head, and its two uses.

`forward` is the plain causal pass over whole sequences; `extend` runs a few more rows against a
cache. Both are pure functions of `Parameters`, which carries its `ModelConfig` as static data.
"""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jax.nn import initializers

from mtd_jax.backend import unrolls_layers
from mtd_jax.config import ModelConfig
from mtd_jax.parameters import Weight
from mtd_jax.sharding import constrain
from mtd_jax.transformer import block, masks
from mtd_jax.transformer.cache import KVCache
from mtd_jax.transformer.linear import contract, rms_norm
from mtd_jax.transformer.stack import Blocks, Rows, Skip, decode_range, rows_at, train_stack
from mtd_jax.typing import Array, Bool, Float, Int


class Parameters(struct.PyTreeNode):
    """All weights of one decoder."""

    embedding: Any
    """[V, D]"""
    blocks: Blocks
    """The layers, stacked along L, or unrolled into one tree a layer."""
    final_norm: Any
    """[D]"""
    head: Any
    """[D, V]; None where it is read from the embedding (`config.tie_embeddings`)."""
    config: ModelConfig = struct.field(pytree_node=False)


def declare(config: ModelConfig) -> Parameters:
    """Every weight of the model, once (`parameters.Weight` leaves)."""
    vocab, width = config.vocab_size, config.hidden_size
    normal = initializers.normal(0.02)
    return Parameters(
        embedding=Weight((vocab, width), ("vocab", "embed"), normal),
        blocks=block.declare(config),
        final_norm=Weight((width,), (None,), initializers.ones),
        head=None if config.tie_embeddings else Weight((width, vocab), ("embed", "vocab"), normal),
        config=config,
    )


def prepare_for_decoding(params: Parameters) -> Parameters:
    """The layout that decodes fastest on this backend.

    On CPU: one buffer a layer, and a tied head as a [D, V] copy, because products of several rows
    with the [V, D] embedding are four times slower (docs/performance.md). Elsewhere: unchanged.
    """
    if not unrolls_layers() or isinstance(params.blocks, tuple):
        return params
    head = params.embedding.T if params.head is None else params.head
    return params.replace(blocks=block.unstack(params.blocks), head=head)


def embed(params: Parameters, tokens: Int[Array, "B T"]) -> Float[Array, "B T D"]:
    """Rows of the embedding; ids must be in 0..V-1 (checked where they enter the program)."""
    # In two steps, because one mesh axis splits both the table's width and the batch: the rows are
    # looked up where their columns live, then exchanged. Asked for at once, XLA gathers the table.
    x = _looked_up(params.embedding, constrain(tokens, "replica", None), params.embedding.shape[0])
    return constrain(constrain(x, "replica", None, "embed"), "batch", None, None)


@partial(jax.custom_vjp, nondiff_argnums=(2,))
def _looked_up(
    table: Float[Array, "V D"], tokens: Int[Array, "B T"], vocab: int
) -> Float[Array, "B T D"]:
    del vocab
    return table[tokens]


def _look_up(table: Array, tokens: Array, vocab: int) -> tuple[Array, Array]:
    return _looked_up(table, tokens, vocab), tokens


def _add_up(vocab: int, tokens: Array, grads: Array) -> tuple[Array, Any]:
    """The table's gradient, summed in float32: in bfloat16 a sum of ones ends at 256."""
    zeros = constrain(jnp.zeros((vocab, grads.shape[-1]), jnp.float32), "vocab", "embed")
    total = zeros.at[tokens].add(grads.astype(jnp.float32))
    no_gradient = np.zeros(tokens.shape, jax.dtypes.float0)
    return constrain(total, "vocab", "embed").astype(grads.dtype), no_gradient


_looked_up.defvjp(_look_up, _add_up)


def unembed(params: Parameters, x: Float[Array, "*rows D"]) -> Float[Array, "*rows V"]:
    """Final norm and output head: float32 logits of any rows."""
    return project(params, normed(params, x))


def normed(params: Parameters, x: Float[Array, "*rows D"]) -> Float[Array, "*rows D"]:
    """The final norm alone."""
    return rms_norm(x, params.final_norm, params.config.norm_eps)


def project(params: Parameters, x: Float[Array, "*rows D"]) -> Float[Array, "*rows V"]:
    """The output head alone: float32 logits of rows that are normed already."""
    inner = (None,) * (x.ndim - 2)
    if math.prod(x.shape[:-1]) < x.shape[-1]:
        # Few rows: the rows go to where the head's columns of the width live, and partial logits
        # are added up. Many rows: the head is gathered, which then moves less.
        x = constrain(x, "replica", *inner, "embed")
    if params.head is None:
        equation, head = "...D,VD->...V", params.embedding
    else:
        equation, head = "...D,DV->...V", params.head
    logits = contract(equation, x, head, jnp.float32)
    return capped(params.config, constrain(logits, "batch", *inner, "vocab"))


def capped(config: ModelConfig, logits: Float[Array, "*rows V"]) -> Float[Array, "*rows V"]:
    """Logits of an output head as the family has them."""
    cap = config.final_logit_softcap
    return logits if cap is None else cap * jnp.tanh(logits / cap)


def forward(params: Parameters, tokens: Int[Array, "B T"]) -> Float[Array, "B T V"]:
    """Logits of a plain causal pass over whole sequences, float32.

    Position t depends on tokens 0..t only, so rows padded behind their text are correct on it (with
    dynamic-NTK rotary embedding the padded length counts as the text's).
    """
    config = params.config
    batch, length = tokens.shape
    positions = jnp.broadcast_to(jnp.arange(length, dtype=jnp.int32), (batch, length))
    context = jnp.full((batch, length), length, jnp.int32)
    mask = masks.causal(positions, positions)
    rows = rows_at(config, positions, positions, mask, context)
    x, _ = train_stack(config, params.blocks, embed(params, tokens), rows=rows)
    return unembed(params, x)


def extend(
    params: Parameters,
    cache: KVCache,
    tokens: Int[Array, "B T"],
    *,
    ancestors: Bool[Array, "b T T"] | None = None,
    context: Int[Array, "B T"] | None = None,
    active: Bool[Array, " B"] | None = None,
    skip: Skip | None = None,
) -> tuple[Float[Array, "B T D"], KVCache]:
    """Runs the next T tokens of every row through all layers, against what the cache holds.

    Row t is stored in slot `cache.length[b] + t` of the cache, but `cache.length` is not moved: see
    `KVCache.commit`. As a chain, row t also stands at that position of the text; as a tree, it
    stands as many positions behind the text as it has ancestors.

    Args:
      ancestors: of trees, who is an ancestor of whom (`masks.tree`); None is a chain.
      context: length of the text each row is computed in (`rope.rotary`); the default is its own
        position + 1, as when tokens are decoded one at a time.
      active: rows that are not active write nothing.
      skip: sublayers to leave out.
    """
    config = params.config
    rows, slots = rows_behind(
        config, cache, tokens.shape[1], ancestors=ancestors, context=context, active=active
    )
    x = embed(params, tokens)
    layers = (0, config.num_layers)
    return decode_range(config, params.blocks, cache, x, *layers, rows=rows, slots=slots, skip=skip)


def rows_behind(
    config: ModelConfig,
    cache: KVCache,
    count: int,
    *,
    ancestors: Bool[Array, "b T T"] | None = None,
    context: Int[Array, "B T"] | None = None,
    active: Bool[Array, " B"] | None = None,
) -> tuple[Rows, Int[Array, "B T"]]:
    """Where the next `count` rows behind a cache stand, what they see, and their slots in it.

    The arguments are those of `extend`.
    """
    batch, capacity = cache.length.shape[0], cache.capacity
    slots = cache.length[:, None] + jnp.arange(count, dtype=jnp.int32)[None, :]
    keys = jnp.broadcast_to(jnp.arange(capacity, dtype=jnp.int32), (batch, capacity))
    positions = slots
    if ancestors is None:
        mask = masks.causal(positions, keys)
    else:
        depth = ancestors.sum(axis=2, dtype=jnp.int32) - 1
        positions = cache.length[:, None] + depth
        mask = masks.tree(cache.length, ancestors, capacity)
        behind = jnp.clip(keys - cache.length[:, None], 0, count - 1)
        inside = cache.length[:, None] + jnp.take_along_axis(depth, behind, axis=1)
        keys = jnp.where(keys < cache.length[:, None], keys, inside)
    if active is not None:
        slots = jnp.where(active[:, None], slots, capacity)
    context = positions + 1 if context is None else context
    return rows_at(config, positions, keys, mask, context), slots
