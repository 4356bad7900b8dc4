"""A short name for a model, made from its config and its weights.

Heads belong to one base; its fingerprint says which. It does not change with the file format or
between float32 and bfloat16: samples are rounded to bfloat16 before hashing. (float16 rounds
otherwise, so a model stored in it has a name of its own.)
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math

import jax
import jax.numpy as jnp
import numpy as np

from mtd_jax.config import ModelConfig, RopeConfig
from mtd_jax.convert.assemble import leaf_paths
from mtd_jax.sharding import fetched
from mtd_jax.transformer.model import Parameters

_SAMPLES = 8192
# Names, special tokens and cycles do not change what the layers compute.
_IGNORED = ("family", "bos_token_id", "eos_token_ids", "pad_token_id", "rope", "cycles")


def fingerprint(params: Parameters) -> str:
    """16 hex digits of SHA-256 over the config and 8192 values of every leaf."""
    leaves = leaf_paths(params)
    digest = hashlib.sha256(_config_text(params.config).encode())
    for (path, leaf), values in zip(leaves, _samples([x for _, x in leaves]), strict=True):
        digest.update(f"{path} {leaf.shape}".encode())
        digest.update(np.asarray(values).view(np.uint16).tobytes())
    return digest.hexdigest()[:16]


def _config_text(config: ModelConfig) -> str:
    """What differs from the defaults, so that a field added later changes no fingerprint."""

    def differing(value: ModelConfig | RopeConfig) -> dict[str, object]:
        return {
            field.name: getattr(value, field.name)
            for field in dataclasses.fields(value)
            if field.name not in _IGNORED and getattr(value, field.name) != field.default
        }

    return json.dumps([differing(config), differing(config.rope)], sort_keys=True)


def _samples(leaves: list[jax.Array]) -> list[np.ndarray]:
    """Values spread over each leaf, rounded to bfloat16; picked on the leaf's own devices."""
    return fetched([leaf[_positions(leaf.shape)].astype(jnp.bfloat16) for leaf in leaves])


def _positions(shape: tuple[int, ...]) -> tuple[np.ndarray, ...]:
    size = math.prod(shape)
    if size <= _SAMPLES:
        flat = np.arange(size, dtype=np.int64)
    else:
        # Multiples of the golden section fall evenly and on ever new rows and columns.
        flat = (np.arange(_SAMPLES, dtype=np.float64) * 0.6180339887498949 % 1 * size).astype(
            np.int64
        )
    return tuple(i.astype(np.int32) for i in np.unravel_index(flat, shape))
