"""The two executors: every walk over the layers, decoding or training, is one of them.

`decode_range` runs any range of layers on a few rows, keys and values in a cache; `train_stack`
runs all layers on whole sequences, without a cache. Both take the layers stacked (one compiled
body, the layer's weights picked by index: GPU, TPU, training) or as one tree a layer (unrolled:
CPU decoding, see `block.unstack`).
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Literal, TypeAlias, TypeVar

import jax
import jax.numpy as jnp
from flax import struct

from mtd_jax.config import ModelConfig
from mtd_jax.transformer import masks
from mtd_jax.transformer.attention import attend_cached, attend_in_parts
from mtd_jax.transformer.beside import Beside, attend_beside
from mtd_jax.transformer.block import Block, apply_attention, apply_block, apply_mlp
from mtd_jax.transformer.cache import KVCache
from mtd_jax.transformer.rope import rotary
from mtd_jax.typing import Array, Bool, Float, Int, Leaf

Carry = TypeVar("Carry")
Remat: TypeAlias = Literal["none", "layer", "dots"]
Blocks: TypeAlias = Block | tuple[Block, ...]
Inject: TypeAlias = Callable[
    [Int[Array, ""], Float[Array, "B T D"], Float[Array, "taps B T D"]], Float[Array, "B T D"]
]


@dataclasses.dataclass(frozen=True)
class Skip:
    """Layers whose attention or MLP is left out: the residual stream passes them unchanged."""

    attention: frozenset[int] = frozenset()
    mlp: frozenset[int] = frozenset()

    def at(self, layer: int) -> tuple[bool, bool]:
        """(attention, MLP) of a layer are left out."""
        return layer in self.attention, layer in self.mlp


class Rows(struct.PyTreeNode):
    """What the layers must know of the rows they run on, the same for every layer."""

    angles: tuple[Float[Array, "B T half"], Float[Array, "B T half"]]
    """Cosines and sines of the rows' positions."""
    mask: Leaf
    """[B, T, S] bool: which keys a row sees where no sliding window applies."""
    positions: Leaf
    """[B, T] int32"""
    keys: Leaf
    """[B, S] int32: positions of the keys."""


def rows_at(
    config: ModelConfig,
    positions: Int[Array, "B T"],
    key_positions: Int[Array, "B S"],
    mask: Bool[Array, "B T S"],
    context: Int[Array, "B T"],
) -> Rows:
    """`Rows` at `positions` that see the keys of `mask`; `context` as in `rope.rotary`."""
    angles = rotary(config, positions, context)
    return Rows(angles=angles, mask=mask, positions=positions, keys=key_positions)


def decode_range(
    config: ModelConfig,
    blocks: Blocks,
    cache: KVCache,
    x: Float[Array, "B T D"],
    start: int,
    stop: int,
    *,
    rows: Rows,
    slots: Int[Array, "B cached"],
    skip: Skip | None = None,
    keep: Bool[Array, "L 2"] | None = None,
    beside: Beside | None = None,
) -> tuple[Float[Array, "B T D"], KVCache]:
    """Runs layers start..stop-1 on rows `x`, storing their keys and values at `slots`.

    `cache.length` is left alone: what is committed is the caller's decision. A slot at or beyond
    the cache's capacity is not written.

    Args:
      skip: sublayers that are not computed; a skipped attention writes no keys and values.
      keep: attention and MLP of each layer whose result counts. They are computed all the same, so
        that trying another set compiles nothing.
      beside: of the last rows of `x`, which `rows` and `slots` know nothing of. They share each
        layer's products with the others, see the cache, and leave nothing in it.
    """
    cached = slots.shape[1]
    angles = rows.angles
    if beside is not None:
        cos, sin = (jnp.concatenate(p, axis=1) for p in zip(angles, beside.angles, strict=True))
        angles = cos, sin

    def body(
        layer: jax.Array,
        block: Block,
        carry: tuple[jax.Array, KVCache],
        without: tuple[bool, bool] = (False, False),
    ) -> tuple[jax.Array, KVCache]:
        x, cache = carry

        def attention(
            q: jax.Array, k: jax.Array, v: jax.Array, layer: jax.Array = layer
        ) -> tuple[jax.Array, KVCache]:
            text, others, own = q[:, :cached], q[:, cached:], (k[:, cached:], v[:, cached:])
            written = cache
            if cached:
                written = cache.write(layer, k[:, :cached], v[:, :cached], slots)
            elif isinstance(blocks, tuple):
                # Nothing that is written says whose turn it is: XLA for CPU would copy keys and
                # values of all layers before it runs the first. A number says it.
                layer = jnp.where(jnp.isnan(q[0, 0, 0, 0, 0]), 0, layer)
            heads = []
            if cached:
                mask, softcap = _visible(config, rows, layer), config.attention_logit_softcap
                heads += [attend_cached(text, written, layer, mask, softcap=softcap)]
            if beside is not None:
                keys, values = written.layer(layer)
                heads += [_attend_beside(config, layer, others, (keys, values), own, beside)]
            return jnp.concatenate(heads, axis=1), written

        if not without[0]:
            after, cache = apply_attention(config, block, x, angles, attention)
            x = after if keep is None else jnp.where(keep[layer, 0], after, x)
        if not without[1]:
            after = apply_mlp(config, block, x)
            x = after if keep is None else jnp.where(keep[layer, 1], after, x)
        return x, cache

    skip = skip or Skip()
    carry = (x, cache)
    # One scan for every run of layers that leave out the same.
    for without, layers in itertools.groupby(range(start, stop), key=skip.at):
        if without != (True, True):
            carry = over_layers(blocks, list(layers), partial(body, without=without), carry)
    return carry


def over_layers(
    blocks: Blocks,
    layers: Sequence[int],
    body: Callable[[Int[Array, ""], Block, Carry], Carry],
    carry: Carry,
    *,
    remat: bool = False,
) -> Carry:
    """`body(layer, block, carry)` for these layers, one after the other.

    The layers' own weights are not to be differentiated: see `train_stack`.

    Args:
      remat: a backward pass finds each layer's carry stored, and nothing else.
    """
    if isinstance(blocks, tuple):
        unrolled: Any = jax.checkpoint(body) if remat else body
        for layer in layers:
            carry = unrolled(jnp.int32(layer), blocks[layer], carry)
        return carry

    def step(carry: Carry, layer: jax.Array) -> tuple[Carry, None]:
        # Picking by index leaves the stack where it is; scanning over blocks[start:stop] would
        # copy the range first.
        block = jax.tree.map(
            lambda w: jax.lax.dynamic_index_in_dim(w, layer, axis=0, keepdims=False), blocks
        )
        return body(layer, block, carry), None

    scanned: Any = jax.checkpoint(step) if remat else step
    return jax.lax.scan(scanned, carry, jnp.array(layers, jnp.int32))[0]


def frozen_range(
    config: ModelConfig,
    blocks: Blocks,
    x: Float[Array, "B T D"],
    start: int,
    stop: int,
    *,
    rows: Rows,
) -> Float[Array, "B T D"]:
    """Layers start..stop-1 on whole sequences, nothing of which is to be differentiated."""

    def body(layer: jax.Array, block: Block, x: jax.Array) -> jax.Array:
        return _on_sequences(config, rows, layer, block, x)[0]

    return jax.lax.stop_gradient(over_layers(blocks, range(start, stop), body, x))


def train_beside(
    config: ModelConfig,
    blocks: Blocks,
    x: Float[Array, "B T D"],
    others: Float[Array, "B TA D"],
    start: int,
    stop: int,
    *,
    rows: Rows,
    beside: Beside,
) -> tuple[Float[Array, "B T D"], Float[Array, "B TA D"]]:
    """Layers start..stop-1 on whole sequences `x` and on `others` beside each of their rows.

    Gradients reach what went into `others`, and neither the layers nor `x`.
    """
    blocks = jax.lax.stop_gradient(blocks)

    def body(
        layer: jax.Array, block: Block, carry: tuple[jax.Array, jax.Array]
    ) -> tuple[jax.Array, jax.Array]:
        x, others = carry
        x, text = jax.lax.stop_gradient(_on_sequences(config, rows, layer, block, x))

        def attention(q: jax.Array, k: jax.Array, v: jax.Array) -> tuple[jax.Array, None]:
            return _attend_beside(config, layer, q, text, (k, v), beside), None

        return x, apply_block(config, block, others, beside.angles, attention)[0]

    return over_layers(blocks, range(start, stop), body, (x, others), remat=True)


def train_stack(
    config: ModelConfig,
    blocks: Blocks,
    x: Float[Array, "B T D"],
    *,
    rows: Rows,
    taps: tuple[int, ...] = (),
    inject: Inject | None = None,
    remat: Remat = "none",
) -> tuple[Float[Array, "B T D"], Float[Array, "taps B T D"]]:
    """Runs all layers on whole sequences in one scan.

    Args:
      taps: layers whose input is returned beside the output, [len(taps), B, T, D].
      inject: `(layer, x, tapped) -> x`, applied to the input of every layer; it must decide by
        `jnp.where(layer == b, ...)`, because the layer is traced. What was tapped before is in
        `tapped`; to come by a layer's input this way, it is stored once for every layer.
      remat: what the backward pass finds stored: everything that it needs ("none"), each layer's
        input ("layer"), or that and the results of products with weights ("dots"). The rest is
        computed again.
    """
    tap_layers = jnp.asarray(taps, jnp.int32).reshape(len(taps), 1, 1, 1)

    def body(
        carry: tuple[jax.Array, jax.Array], scanned: tuple[jax.Array, Block]
    ) -> tuple[tuple[jax.Array, jax.Array], None]:
        (x, tapped), (layer, block) = carry, scanned
        if inject is not None:
            x = inject(layer, x, tapped)
        if taps:
            tapped = jnp.where(tap_layers == layer, x[None], tapped)

        return (_on_sequences(config, rows, layer, block, x)[0], tapped), None

    step = body
    if remat == "layer":
        step = jax.checkpoint(body)
    elif remat == "dots":
        policy = jax.checkpoint_policies.dots_with_no_batch_dims_saveable
        step = jax.checkpoint(body, policy=policy)
    carry = (x, jnp.zeros((len(taps), *x.shape), x.dtype))
    if isinstance(blocks, tuple):
        for layer, block in enumerate(blocks):
            carry, _ = step(carry, (jnp.int32(layer), block))
        return carry
    # Scanned as xs, not by index: the backward pass then stacks each layer's gradient once instead
    # of adding it into a buffer of the whole stack.
    layers = jnp.arange(config.num_layers, dtype=jnp.int32)
    return jax.lax.scan(step, carry, (layers, blocks))[0]


def _on_sequences(
    config: ModelConfig, rows: Rows, layer: jax.Array, block: Block, x: jax.Array
) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    """A layer on whole sequences; its keys and values as they would lie in a cache."""

    def attention(
        q: jax.Array, k: jax.Array, v: jax.Array
    ) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
        mask = _visible(config, rows, layer)
        keys, values = k.transpose(0, 2, 3, 1), v.transpose(0, 2, 1, 3)
        heads = attend_in_parts(q, keys, values, mask, softcap=config.attention_logit_softcap)
        return heads, (keys, values)

    return apply_block(config, block, x, rows.angles, attention)


def _attend_beside(
    config: ModelConfig,
    layer: jax.Array,
    q: jax.Array,
    text: tuple[jax.Array, jax.Array],
    own: tuple[jax.Array, jax.Array],
    beside: Beside,
) -> jax.Array:
    window, softcap = _window(config, layer), config.attention_logit_softcap
    return attend_beside(q, text, own, beside, window=window, softcap=softcap)


def _visible(config: ModelConfig, rows: Rows, layer: jax.Array) -> jax.Array:
    window = _window(config, layer)
    if window is None:
        return rows.mask
    return rows.mask & masks.within_window(rows.positions, rows.keys, window)


def _window(config: ModelConfig, layer: jax.Array) -> jax.Array | None:
    """Positions that a row of a layer sees, itself among them; None: all, in every layer."""
    if config.sliding_windows is None:
        return None
    everything = 2**30
    sizes = [everything if w is None else w for w in config.sliding_windows]
    return jnp.asarray(sizes, jnp.int32)[layer]
