from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mtd_jax.transformer.cache import KVCache, bucket
from tests.support import tiny


def _cache(batch: int = 2, capacity: int = 128) -> KVCache:
    return KVCache.empty(tiny.CONFIG, batch, capacity, jnp.float32)


def _rows(batch: int, rows: int, seed: int = 0) -> jax.Array:
    shape = (batch, rows, tiny.CONFIG.num_kv_heads, tiny.CONFIG.head_dim)
    return jax.random.normal(jax.random.key(seed), shape)


def test_write_puts_rows_into_their_slots() -> None:
    k, v = _rows(2, 3, 1), _rows(2, 3, 2)
    slots = jnp.array([[0, 1, 2], [40, 41, 42]], jnp.int32)
    cache = _cache().write(jnp.int32(1), k, v, slots)
    for b in range(2):
        for t in range(3):
            np.testing.assert_array_equal(cache.k[1, b, :, :, slots[b, t]], k[b, t])
            np.testing.assert_array_equal(cache.v[1, b, :, slots[b, t]], v[b, t])
    assert int((cache.k != 0).sum()) == k.size
    assert int((cache.v != 0).sum()) == v.size


def test_write_beyond_capacity_is_dropped_not_clamped() -> None:
    cache = _cache(1, 128).write(
        jnp.int32(0), _rows(1, 3), _rows(1, 3), jnp.array([[127, 128, 500]], jnp.int32)
    )
    np.testing.assert_array_equal(cache.k[0, 0, :, :, 127], _rows(1, 3)[0, 0])
    assert not cache.k[0, 0, :, :, :127].any()


def test_grow_keeps_contents() -> None:
    cache = _cache().write(
        jnp.int32(2), _rows(2, 1), _rows(2, 1), jnp.array([[5], [127]], jnp.int32)
    )
    grown = cache.grow(256)
    assert grown.capacity == 256
    np.testing.assert_array_equal(grown.k[..., :128], cache.k)
    np.testing.assert_array_equal(grown.v[..., :128, :], cache.v)
    assert not grown.k[..., 128:].any()


@pytest.mark.parametrize(
    ("needed", "limit", "expected"),
    [
        (1, 8192, 128),
        (128, 8192, 128),
        (129, 8192, 256),
        (5000, 8192, 8192),
        (300, 300, 384),
        (513, 301, 640),
    ],
)
def test_bucket(needed: int, limit: int, expected: int) -> None:
    assert bucket(needed, limit) == expected
