"""A few rows, float32, on a CPU: their product with a large matrix, and their attention to a cache.

Every weight is read once, as it lies. XLA's products of 2 to 16 rows take 1.2 to 2 times as long as
those of one (docs/performance.md), although they read the same weights. These take little longer
for eight rows than for one, and a row does not depend, not by a bit, on how many there are.

Of attention XLA copies each layer's keys and values out of the cache, and reads all of its slots.
Here the cache is read where it lies, as far as a row sees.
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
from mtd_jax.typing import Array, Bool, Float, Int

MOST_ROWS = 16
"""With more of them arithmetic takes longer than reading, and XLA's product is as fast."""

_PRODUCT, _ATTEND = "mtd_few_rows_2", "mtd_attend_cached_1"
_TILE = 32
"""Slots of a cache are a multiple of it."""
_MOST_QUERIES = 128
"""Rows times the query heads of a key head: their sums stay in the first cache."""
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


def attends(q: jax.Array, k: jax.Array, v: jax.Array) -> bool:
    """Whether `attend` should be used for these, in the program that is being traced."""
    rows, group, slots = q.shape[1], q.shape[3], k.shape[-1]
    fits = group * rows <= _MOST_QUERIES and slots % _TILE == 0
    return fits and takes(rows, q.dtype, k.dtype, v.dtype)


def attend(
    q: Float[Array, "B T K G H"],
    k: Float[Array, "L B K H S"],
    v: Float[Array, "L B K S H"],
    layer: Int[Array, ""],
    mask: Bool[Array, "B T S"],
) -> Float[Array, "B T K G H"]:
    """softmax(q k^T / sqrt(H)) v with a layer's keys and values; zeros where a row sees nothing.

    Raises:
      RuntimeError: there is no such kernel here; `attends` says so before.
    """
    if not _registered():
        raise RuntimeError("attention of few rows is not compiled on this machine")
    shape = jax.ShapeDtypeStruct(q.shape, jnp.float32)
    call = jax.ffi.ffi_call(_ATTEND, shape, vmap_method="sequential")
    result: jax.Array = call(q, k, v, layer, mask)
    return result


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
    call = jax.ffi.ffi_call(_PRODUCT, shape, vmap_method="sequential")
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
    for name, symbol in ((_PRODUCT, found.MtdFewRows), (_ATTEND, found.MtdAttendCached)):
        jax.ffi.register_ffi_target(name, jax.ffi.pycapsule(symbol), platform="cpu")
    return True
