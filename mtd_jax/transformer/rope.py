"""Rotary position embedding (arXiv 2104.09864) and its long-context forms.

Frequencies are made on the host in float32, operation by operation as in the reference
implementations: the models were trained with those roundings. The one exception is dynamic NTK,
whose base depends on the length of the text and is computed under jit.
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np

from mtd_jax.config import ModelConfig, RopeConfig
from mtd_jax.typing import Array, Float, Int


def rotary(
    config: ModelConfig, positions: Int[Array, "B T"], context: Int[Array, "B T"]
) -> tuple[Float[Array, "B T half"], Float[Array, "B T half"]]:
    """Cosines and sines for rows at `positions`, float32, half = H / 2.

    `context` is the length of the text that each row is computed in: all of the prompt for the
    rows of a prompt, position + 1 for a row that is decoded. Only dynamic NTK looks at it.
    """
    rope, dim = config.rope, config.head_dim
    if rope.kind == "dynamic":
        frequencies = _dynamic_frequencies(rope, dim, context)
    else:
        frequencies = jnp.asarray(inverse_frequencies(rope, dim))[None, None, :]
    angles = positions[..., None].astype(jnp.float32) * frequencies
    scale = jnp.float32(attention_scale(rope))
    return jnp.cos(angles) * scale, jnp.sin(angles) * scale


def apply_rotary(
    x: Float[Array, "B T n H"], cos: Float[Array, "B T half"], sin: Float[Array, "B T half"]
) -> Float[Array, "B T n H"]:
    """Turns the pairs (x[i], x[i + H/2]) of every head; computed in float32."""
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    cos, sin = cos[:, :, None, :], sin[:, :, None, :]
    turned = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return turned.astype(x.dtype)


def inverse_frequencies(rope: RopeConfig, dim: int) -> np.ndarray:
    """[dim / 2] float32 frequencies of every kind that does not depend on the text's length."""
    base = _base_frequencies(rope.theta, dim)
    if rope.kind == "linear":
        return base / np.float32(rope.factor)
    if rope.kind == "llama3":
        return _llama3_frequencies(rope, base)
    if rope.kind == "yarn":
        return _yarn_frequencies(rope, dim)
    return base


def attention_scale(rope: RopeConfig) -> float:
    """YaRN's scale of cosines and sines (arXiv 2309.00071, eq. 22); 1 for every other kind."""
    if rope.kind != "yarn":
        return 1.0
    if rope.attention_factor is not None:
        return rope.attention_factor

    def magnitude(mscale: float) -> float:
        return 0.1 * mscale * math.log(rope.factor) + 1.0 if rope.factor > 1.0 else 1.0

    if rope.mscale and rope.mscale_all_dim:
        return magnitude(rope.mscale) / magnitude(rope.mscale_all_dim)
    return magnitude(1.0)


def _base_frequencies(theta: float, dim: int) -> np.ndarray:
    exponents = np.arange(0, dim, 2, dtype=np.float32) / np.float32(dim)
    return np.float32(1.0) / np.float32(theta) ** exponents


def _dynamic_frequencies(
    rope: RopeConfig, dim: int, context: Int[Array, "B T"]
) -> Float[Array, "B T half"]:
    """NTK-aware scaling whose base grows with the text once it passes the trained length.

    Rounded to float32 where the reference rounds. XLA's own float32 power is up to 3 units off in
    the last place, which at position 500 moves a logit by more than 1e-4; hence float64 within.
    """
    assert rope.original_max_position is not None  # RopeConfig requires it for this kind
    trained = float(rope.original_max_position)
    length = jnp.maximum(context.astype(jnp.float32), trained)
    grown = rope.factor * length / trained - (rope.factor - 1.0)
    base = rope.theta * _power(grown, np.asarray(dim / (dim - 2)))
    exponents = np.arange(0, dim, 2, dtype=np.float32) / np.float32(dim)
    return 1.0 / _power(base[..., None], exponents[None, None, :])


def _power(base: Float[Array, "..."], exponent: np.ndarray) -> Float[Array, "..."]:
    """base ** exponent; on CPUs and GPUs exact up to the rounding of its result.

    TPUs make float64 of float32s, with a few digits less. No gradient is taken through it.
    """
    with jax.enable_x64(True):
        power = base.astype(jnp.float64) ** jnp.asarray(exponent, jnp.float64)
        return power.astype(jnp.float32)


def _llama3_frequencies(rope: RopeConfig, base: np.ndarray) -> np.ndarray:
    """Llama 3.1: long wavelengths are divided by the factor, short ones stay, smooth between."""
    assert rope.original_max_position is not None  # RopeConfig requires it for this kind
    trained = rope.original_max_position
    wavelengths = np.float32(2 * math.pi) / base
    smooth = (np.float32(trained) / wavelengths - np.float32(rope.low_freq_factor)) / np.float32(
        rope.high_freq_factor - rope.low_freq_factor
    )
    stretched = base / np.float32(rope.factor)
    between = (1 - smooth) * stretched + smooth * base
    scaled = np.where(wavelengths > trained / rope.low_freq_factor, stretched, between)
    return np.where(wavelengths < trained / rope.high_freq_factor, base, scaled).astype(np.float32)


def _yarn_frequencies(rope: RopeConfig, dim: int) -> np.ndarray:
    """YaRN (arXiv 2309.00071, section 3.2): interpolate slow dimensions, keep fast ones."""
    assert rope.original_max_position is not None  # RopeConfig requires it for this kind
    trained = rope.original_max_position

    def dimension(turns: float) -> float:
        """The (fractional) pair that turns this often over the trained context."""
        return dim * math.log(trained / (turns * 2 * math.pi)) / (2 * math.log(rope.theta))

    low, high = dimension(rope.beta_fast), dimension(rope.beta_slow)
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    if low == high:
        high += 0.001  # the reference's guard against dividing by zero
    ramp = np.clip((np.arange(dim // 2, dtype=np.float32) - low) / (high - low), 0, 1)
    keep = (1 - ramp).astype(np.float32)
    base = _base_frequencies(rope.theta, dim)
    return (base / np.float32(rope.factor) * (1 - keep) + base * keep).astype(np.float32)
