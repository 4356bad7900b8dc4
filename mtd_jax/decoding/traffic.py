"""Bytes that decoding must read: what its speed is bound by."""

from __future__ import annotations

import numpy as np

from mtd_jax.parameters import size_in_bytes
from mtd_jax.transformer.model import Parameters
from mtd_jax.transformer.stack import Skip


def weight_bytes(params: Parameters, skip: Skip | None = None) -> int:
    """Bytes of weights that a decode step reads, on all devices together.

    The embedding counts only where it is the output head as well; else a step reads a row of it.
    """
    total = size_in_bytes(params)
    if params.head is not None:
        total -= size_in_bytes(params.embedding)
    return total if skip is None else total - _skipped_bytes(params, skip)


def cache_bytes(params: Parameters, batch: int, length: float) -> float:
    """Bytes of keys and values that a step reads for rows that are `length` tokens long."""
    config = params.config
    row = 2 * config.num_layers * config.num_kv_heads * config.head_dim
    return batch * length * row * np.dtype(params.embedding.dtype).itemsize


def _skipped_bytes(params: Parameters, skip: Skip) -> int:
    """Matrices of the sublayers left out; norms and biases are nothing beside them."""
    blocks = params.blocks
    layer, parts = (
        (blocks[0], 1) if isinstance(blocks, tuple) else (blocks, params.config.num_layers)
    )
    attention = size_in_bytes((layer.qkv, layer.attention_out)) // parts
    mlp = size_in_bytes((layer.gate_up, layer.down)) // parts
    return len(skip.attention) * attention + len(skip.mlp) * mlp
