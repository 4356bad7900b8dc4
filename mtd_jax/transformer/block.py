"""One decoder layer: its weights and what it computes.

Projections that read the same input are stored as one matrix, because decoding is bound by reading
weights and one wide product streams them better than several narrow ones. The fused axes are
grouped by key/value head, so a tensor-parallel shard holds whole groups and splitting q, k and v
apart moves nothing.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import jax
import numpy as np
from flax import struct
from jax.nn import initializers

from mtd_jax.config import ModelConfig
from mtd_jax.parameters import Weight
from mtd_jax.sharding import constrain
from mtd_jax.transformer.linear import contract, rms_norm
from mtd_jax.transformer.rope import apply_rotary
from mtd_jax.typing import Array, Float

Carry = TypeVar("Carry")

Attention = Callable[[jax.Array, jax.Array, jax.Array], tuple[jax.Array, Carry]]
"""(q [B T K G H], k [B T K H], v [B T K H]) -> (heads [B T K G H], what the caller carries on)."""


class Block(struct.PyTreeNode):
    """Weights of the layers: stacked along a leading L, or of one layer (without it)."""

    attention_norm: Any
    """[L, D]"""
    qkv: Any
    """[L, D, K, G + 2, H]: for each key head its G query heads, then the key, then the value."""
    attention_out: Any
    """[L, K, G * H, D]"""
    mlp_norm: Any
    """[L, D]"""
    gate_up: Any
    """[L, D, 2, F]: gate, then up."""
    down: Any
    """[L, F, D]"""
    qkv_bias: Any = None
    """[L, K, G + 2, H]"""
    attention_out_bias: Any = None
    """[L, D]"""
    q_norm: Any = None
    """[L, H]"""
    k_norm: Any = None
    """[L, H]"""
    gate_up_bias: Any = None
    """[L, 2, F]"""
    down_bias: Any = None
    """[L, D]"""


def declare(config: ModelConfig) -> Block:
    """The stacked layers of a model as `Weight`s; a weight that it does not have is None."""
    c = config
    layers, width, ffn, groups = c.num_layers, c.hidden_size, c.intermediate_size, c.num_kv_heads
    fused, head = c.group_size + 2, c.head_dim

    def matrix(*axes: tuple[str | None, int]) -> Weight:
        names, sizes = zip(*axes, strict=True)
        return Weight((layers, *sizes), ("layers", *names), initializers.normal(0.02))

    def vector(init: Any, *axes: tuple[str | None, int]) -> Weight:
        names, sizes = zip(*axes, strict=True)
        return Weight((layers, *sizes), ("layers", *names), init)

    ones, zeros = initializers.ones, initializers.zeros
    norm = vector(ones, (None, width))
    return Block(
        attention_norm=norm,
        qkv=matrix(("embed", width), ("kv_heads", groups), (None, fused), (None, head)),
        attention_out=matrix(("kv_heads", groups), (None, c.group_size * head), ("embed", width)),
        mlp_norm=norm,
        gate_up=matrix(("embed", width), (None, 2), ("mlp", ffn)),
        down=matrix(("mlp", ffn), ("embed", width)),
        qkv_bias=vector(zeros, ("kv_heads", groups), (None, fused), (None, head))
        if c.qkv_bias
        else None,
        attention_out_bias=vector(zeros, (None, width)) if c.attention_out_bias else None,
        q_norm=vector(ones, (None, head)) if c.qk_norm else None,
        k_norm=vector(ones, (None, head)) if c.qk_norm else None,
        gate_up_bias=vector(zeros, (None, 2), ("mlp", ffn)) if c.mlp_bias else None,
        down_bias=vector(zeros, (None, width)) if c.mlp_bias else None,
    )


def apply_block(
    config: ModelConfig,
    block: Block,
    x: Float[Array, "B T D"],
    angles: tuple[Float[Array, "B T half"], Float[Array, "B T half"]],
    attention: Attention[Carry],
) -> tuple[Float[Array, "B T D"], Carry]:
    """One layer (`block` without L) on rows whose rotary `angles` are given.

    `attention` decides where keys come from (the sequence, a cache) and what is carried on.
    """
    x, carry = apply_attention(config, block, x, angles, attention)
    return apply_mlp(config, block, x), carry


def apply_attention(
    config: ModelConfig,
    block: Block,
    x: Float[Array, "B T D"],
    angles: tuple[Float[Array, "B T half"], Float[Array, "B T half"]],
    attention: Attention[Carry],
) -> tuple[Float[Array, "B T D"], Carry]:
    """The first half of a layer: x + attention(norm(x))."""
    q, k, v = project_qkv(config, block, rms_norm(x, block.attention_norm, config.norm_eps), angles)
    heads, carry = attention(q, k, v)
    return x + project_heads(block, heads), carry


def apply_mlp(config: ModelConfig, block: Block, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
    """The second half: x + mlp(norm(x))."""
    x = x + mlp(block, rms_norm(x, block.mlp_norm, config.norm_eps))
    return constrain(x, "batch", None, None)


def project_qkv(
    config: ModelConfig,
    block: Block,
    x: Float[Array, "B T D"],
    angles: tuple[Float[Array, "B T half"], Float[Array, "B T half"]],
) -> tuple[Float[Array, "B T K G H"], Float[Array, "B T K H"], Float[Array, "B T K H"]]:
    """Queries and keys (normed where the model does so, rotated) and values of normed rows."""
    fused = contract("BTD,DKJH->BTKJH", x, block.qkv)
    if block.qkv_bias is not None:
        fused = fused + block.qkv_bias[None, None]
    fused = constrain(fused, "batch", None, "kv_heads", None, None)
    q, k, v = fused[..., :-2, :], fused[..., -2, :], fused[..., -1, :]
    if block.q_norm is not None:
        q = rms_norm(q, block.q_norm, config.norm_eps)
        k = rms_norm(k, block.k_norm, config.norm_eps)
    batch, rows, groups, shared, head = q.shape
    q = apply_rotary(q.reshape(batch, rows, groups * shared, head), *angles).reshape(q.shape)
    return q, apply_rotary(k, *angles), v


def project_heads(block: Block, heads: Float[Array, "B T K G H"]) -> Float[Array, "B T D"]:
    """The output projection of attention."""
    # Merged by hand: contracting two axes at once makes XLA for CPU copy the weight every step.
    weight = block.attention_out.reshape(-1, block.attention_out.shape[-1])
    out = contract("BTI,ID->BTD", heads.reshape(*heads.shape[:2], -1), weight)
    return out if block.attention_out_bias is None else out + block.attention_out_bias[None, None]


def mlp(block: Block, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
    """SwiGLU (arXiv 2002.05202): down(silu(gate(x)) * up(x)) of normed rows."""
    both = contract("BTD,DCF->BTCF", x, block.gate_up)
    if block.gate_up_bias is not None:
        both = both + block.gate_up_bias[None, None]
    both = constrain(both, "batch", None, None, "mlp")
    hidden = jax.nn.silu(both[..., 0, :]) * both[..., 1, :]
    out = contract("BTF,FD->BTD", hidden, block.down)
    return out if block.down_bias is None else out + block.down_bias[None, None]


def unstack(blocks: Block) -> tuple[Block, ...]:
    """One tree a layer, each with buffers of its own.

    XLA for CPU copies a layer out of a stack before it multiplies with it (and all of them, if the
    index is a constant); separate buffers are read where they lie. On one CPU device nothing is
    copied: the layers are views into the stack's memory.
    """
    leaves, structure = jax.tree.flatten(blocks)
    split = [_split(leaf) for leaf in leaves]
    return tuple(jax.tree.unflatten(structure, layer) for layer in zip(*split, strict=True))


def _split(stack: jax.Array) -> list[jax.Array]:
    if isinstance(stack, jax.core.Tracer):
        return list(stack)  # of shapes alone: `mtd compile`
    device, *others = stack.devices()
    if others or device.platform != "cpu":
        return list(stack)
    return [jax.device_put(view, device, may_alias=True) for view in np.asarray(stack)]
