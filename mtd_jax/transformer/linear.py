"""Matrix products and the norm: the arithmetic that every layer shares, with its dtypes settled."""

from __future__ import annotations

import functools
import math

import jax
import jax.numpy as jnp

from mtd_jax.kernels import few_rows
from mtd_jax.typing import Array, Float


def precision_of(x: jax.Array) -> jax.lax.Precision:
    """float32 operands are multiplied as float32.

    The default on TPUs (bf16 passes) and recent GPUs (TF32) would quietly give three digits.
    """
    is_float32 = x.dtype == jnp.float32
    return jax.lax.Precision.HIGHEST if is_float32 else jax.lax.Precision.DEFAULT


def contract(
    equation: str, x: jax.Array, weight: jax.Array, dtype: jax.typing.DTypeLike | None = None
) -> jax.Array:
    """`einsum(equation, x, weight)`, accumulated in float32, in the dtype of `x` or in `dtype`.

    Few rows on a CPU are multiplied by a kernel of the package's own (`kernels/few_rows.py`).
    """
    inner = _contracted(equation)
    if inner and few_rows.takes(math.prod(x.shape[:-inner]), x.dtype, weight.dtype):
        depth = math.prod(weight.shape[:inner])
        rows = few_rows.product(x.reshape(-1, depth), weight.reshape(depth, -1))
        return rows.reshape(x.shape[:-inner] + weight.shape[inner:])
    return jnp.einsum(equation, x, weight, precision=precision_of(x), preferred_element_type=dtype)


@functools.cache
def _contracted(equation: str) -> int:
    """How many axes x ends with and the weight begins with, if these alone are summed; else 0."""
    left, out = equation.split("->")
    rows, weight = left.split(",")
    summed = "".join(axis for axis in weight if axis not in out)
    kept = weight.removeprefix(summed)
    plain = weight.startswith(summed) and rows.endswith(summed)
    return len(summed) if plain and rows.removesuffix(summed) + kept == out else 0


def rms_norm(
    x: Float[Array, "*rows width"], scale: Array, eps: float
) -> Float[Array, "*rows width"]:
    """x / rms(x) * scale over the last axis (arXiv 1910.07467), in float32."""
    x32 = x.astype(jnp.float32)
    inverse = jax.lax.rsqrt(jnp.mean(jnp.square(x32), axis=-1, keepdims=True) + eps)
    # Round once before the scale, as the reference implementations do: bf16 parity needs it.
    normed = (x32 * inverse).astype(x.dtype)
    return normed * scale.reshape((1,) * (x.ndim - 1) + (-1,))
