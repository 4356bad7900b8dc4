"""Model FLOPs utilisation: the work that the method needs, over what the devices could do.

The convention (PaLM, arXiv 2204.02311, appendix B): a product with a weight costs 2 operations a
token forward, 2 for the gradient of the row and 2 for that of the weight; attention costs 4 H
operations for every query head, layer and key that a token *sees* (causal, within its document)
forward and 8 backward. What is computed again to save memory, or masked away, does not count, nor
do padding tokens.
"""

from __future__ import annotations

import functools
import itertools
import math
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mtd_jax.config import ModelConfig
from mtd_jax.transformer.model import Parameters

_PEAK_BFLOAT16 = {
    # Dense bfloat16 FLOP/s of one device, as its maker states them.
    "TPU v4": 275e12,
    "TPU v5 lite": 197e12,
    "TPU v5e": 197e12,
    "TPU v5": 459e12,
    "TPU v5p": 459e12,
    "TPU v6 lite": 918e12,
    "TPU v6e": 918e12,
    "TPU7x": 2307e12,
    "NVIDIA A100": 312e12,
    # The cards for a slot have fewer cores or lower clocks than those on a board (SXM).
    "NVIDIA H100": 989e12,
    "NVIDIA H100 NVL": 835e12,
    "NVIDIA H100 PCIe": 756e12,
    "NVIDIA H200": 989e12,
    "NVIDIA H200 NVL": 835e12,
}
_SIZE = 2048


def weights_in_products(params: Parameters) -> int:
    """Weights that tokens are multiplied with: no norms, no biases, no lookup in the embedding.

    Of a part of the parameters (`None` elsewhere), those that are there.
    """
    blocks: Any = params.blocks
    tied = params.config.tie_embeddings
    output = params.embedding if tied else params.head
    matrices = (blocks.qkv, blocks.attention_out, blocks.gate_up, blocks.down, output)
    return sum(math.prod(x.shape) for x in matrices if x is not None)


def attention_flops(config: ModelConfig, keys_seen: float, *, backward: bool = True) -> float:
    """Operations a token for scores and values, forward and, if it is run, backward.

    Args:
      keys_seen: in the mean of the layers, where these have different windows.
    """
    return (
        (12.0 if backward else 4.0)
        * config.num_layers
        * config.num_heads
        * config.head_dim
        * keys_seen
    )


def keys_seen(config: ModelConfig, segments: np.ndarray) -> float:
    """Mean number of keys that a token sees in a layer, of all layers with their windows.

    Args:
      segments: [rows, T] segment numbers, 0 is padding.
    """
    windows = config.sliding_windows or (None,)
    lengths = [count for row in segments for count in np.bincount(row)[1:].tolist()]
    seen = 0
    for window, count in itertools.product(windows, lengths):
        near = count if window is None else min(count, window)
        seen += near * (near + 1) // 2 + (count - near) * near
    return seen / max(sum(lengths), 1) / len(windows)


def peak_of(kind: str) -> float | None:
    """FLOP/s in bfloat16 of a device of this kind, as JAX names it; None if not known here."""
    known = [name for name in _PEAK_BFLOAT16 if kind.startswith(name)]
    return _PEAK_BFLOAT16[max(known, key=len)] if known else None


def peak_flops(device: jax.Device) -> float:
    """FLOP/s of one device in bfloat16; of a kind not known here, what a large product reaches."""
    known = peak_of(device.device_kind)
    if known is not None:
        return known
    # Simulated devices share one processor.
    return _measured() / (jax.local_device_count() if device.platform == "cpu" else 1)


@functools.cache
def _measured() -> float:
    """Once in a process: five products of this size take a second of two CPU cores."""
    dtype: Any = jnp.float32 if jax.default_backend() == "cpu" else jnp.bfloat16
    x = jnp.ones((_SIZE, _SIZE), dtype)
    product = jax.jit(jnp.matmul)
    product(x, x).block_until_ready()
    best = float("inf")
    for _ in range(5):
        began = time.perf_counter()
        product(x, x).block_until_ready()
        best = min(best, time.perf_counter() - began)
    return 2 * _SIZE**3 / best
