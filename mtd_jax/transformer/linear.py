"""Matrix products and the norm: the arithmetic that every layer shares, with its dtypes settled."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from mtd_jax.typing import Array, Float


def precision_of(x: jax.Array) -> jax.lax.Precision:
    """float32 operands are multiplied as float32.

    The default on TPUs (bf16 passes) and recent GPUs (TF32) would quietly give three digits.
    """
    is_float32 = x.dtype == jnp.float32
    return jax.lax.Precision.HIGHEST if is_float32 else jax.lax.Precision.DEFAULT


def contract(equation: str, x: jax.Array, weight: jax.Array) -> jax.Array:
    """`einsum(equation, x, weight)`, accumulated in float32, returned in the dtype of `x`."""
    return jnp.einsum(equation, x, weight, precision=precision_of(x))


def rms_norm(
    x: Float[Array, "*rows width"], scale: Array, eps: float
) -> Float[Array, "*rows width"]:
    """x / rms(x) * scale over the last axis (arXiv 1910.07467), in float32."""
    x32 = x.astype(jnp.float32)
    inverse = jax.lax.rsqrt(jnp.mean(jnp.square(x32), axis=-1, keepdims=True) + eps)
    # Round once before the scale, as the reference implementations do: bf16 parity needs it.
    normed = (x32 * inverse).astype(x.dtype)
    return normed * scale.reshape((1,) * (x.ndim - 1) + (-1,))
