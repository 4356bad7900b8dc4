"""A few rows times a large matrix, float32, on a CPU: every weight is read once, as it lies.

XLA's products of 2 to 16 rows take 1.3 to 2 times as long as those of one (docs/performance.md),
although they read the same weights. This one takes little longer for eight rows than for one, and
its rows do not depend, not even by a bit, on how many there are.
"""

from __future__ import annotations

import contextlib
import contextvars
import functools
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
from jax.custom_derivatives import SymbolicZero

from mtd_jax.kernels import library
from mtd_jax.typing import Array, Float

MOST_ROWS = 16
"""With more of them arithmetic takes longer than reading, and XLA's product is as fast."""

_TARGET = "mtd_few_rows_1"
_LEFT_OUT = contextvars.ContextVar("few_rows left out", default=False)


@contextlib.contextmanager
def left_out() -> Iterator[None]:
    """Programs that are traced inside have XLA's products: to measure one beside the other."""
    before = _LEFT_OUT.set(True)
    try:
        yield
    finally:
        _LEFT_OUT.reset(before)


def takes(rows: int, *dtypes: jax.typing.DTypeLike) -> bool:
    """Whether `product` should be used for so many rows, in the program that is being traced.

    Programs for a mesh are cut by XLA, which does not know how to cut a kernel.
    """
    few = 0 < rows <= MOST_ROWS and all(jnp.dtype(d) == jnp.float32 for d in dtypes)
    here = few and jax.default_backend() == "cpu" and jax.sharding.get_abstract_mesh().empty
    return here and not _LEFT_OUT.get() and _registered()


def product(x: Float[Array, "rows depth"], weight: Float[Array, "depth width"]) -> jax.Array:
    """`x @ weight` [rows, width].

    Raises:
      RuntimeError: there is no such kernel here; `takes` says so before.
    """
    if not _registered():
        raise RuntimeError("products of few rows are not compiled on this machine")
    return _product(x, weight)


@jax.custom_jvp
def _product(x: jax.Array, weight: jax.Array) -> jax.Array:
    shape = jax.ShapeDtypeStruct((x.shape[0], weight.shape[1]), jnp.float32)
    call = jax.ffi.ffi_call(_TARGET, shape, vmap_method="sequential")
    result: jax.Array = call(x, weight)
    return result


def _product_jvp(
    primals: tuple[jax.Array, jax.Array], tangents: tuple[Any, Any]
) -> tuple[jax.Array, Any]:
    """XLA's products for the tangents, which it can transpose; none for what does not change."""
    (x, weight), (dx, dweight) = primals, tangents
    matmul = functools.partial(jnp.matmul, precision=jax.lax.Precision.HIGHEST)
    terms = []
    if not isinstance(dx, SymbolicZero):
        terms.append(matmul(dx, weight))
    if not isinstance(dweight, SymbolicZero):
        terms.append(matmul(x, dweight))
    found = _product(x, weight)
    return found, sum(terms, jnp.zeros_like(found))


_product.defjvp(_product_jvp, symbolic_zeros=True)


@functools.cache
def _registered() -> bool:
    found = library.load()
    if found is None:
        return False
    jax.ffi.register_ffi_target(_TARGET, jax.ffi.pycapsule(found.MtdFewRows), platform="cpu")
    return True
