"""Keys and values of all layers, and how many of them each row has committed."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import struct

from mtd_jax.config import ModelConfig
from mtd_jax.sharding import constrain
from mtd_jax.typing import Array, DTypeLike, Float, Int, Leaf

_MIN_CAPACITY = 128


class KVCache(struct.PyTreeNode):
    """The cache travels whole in the carry of the layer loop, so it is updated in place.

    Rollback is a smaller `length`: slots at and behind it are overwritten before they are read.
    """

    k: Leaf
    """[L, B, K, H, S]: transposed, as the scores' matrix product reads it."""
    v: Leaf
    """[L, B, K, S, H]"""
    length: Leaf
    """[B] int32: committed tokens of each row; token i of a row lies in slot i."""

    @property
    def capacity(self) -> int:
        """S: slots a row has."""
        return self.v.shape[3]

    @classmethod
    def empty(cls, config: ModelConfig, batch: int, capacity: int, dtype: DTypeLike) -> KVCache:
        """A cache with nothing in it; laid out over the mesh, if one is set."""
        heads, width = config.num_kv_heads, config.head_dim
        k = jnp.zeros((config.num_layers, batch, heads, width, capacity), dtype)
        v = jnp.zeros((config.num_layers, batch, heads, capacity, width), dtype)
        axes = ("layers", "batch", "kv_heads", None, None)
        length = jnp.zeros(batch, jnp.int32)
        return cls(k=constrain(k, *axes), v=constrain(v, *axes), length=length)

    def write(
        self,
        layer: Int[Array, ""],
        k: Float[Array, "B T K H"],
        v: Float[Array, "B T K H"],
        slots: Int[Array, "B T"],
    ) -> KVCache:
        """Stores the rows of one layer; a slot at or beyond the capacity is not written."""
        rows = jnp.arange(slots.shape[0], dtype=slots.dtype)[:, None]
        return self.replace(
            k=self.k.at[layer, rows, :, :, slots].set(k, mode="drop"),
            v=self.v.at[layer, rows, :, slots].set(v, mode="drop"),
        )

    def layer(
        self, layer: Int[Array, ""]
    ) -> tuple[Float[Array, "B K H S"], Float[Array, "B K S H"]]:
        """Keys and values of one layer."""
        k = jax.lax.dynamic_index_in_dim(self.k, layer, axis=0, keepdims=False)
        v = jax.lax.dynamic_index_in_dim(self.v, layer, axis=0, keepdims=False)
        return k, v

    def commit(self, count: Int[Array, " B"], path: Int[Array, "B P"] | None = None) -> KVCache:
        """Makes `count` of the rows behind the committed ones part of the text.

        Row b's i-th new token is what was written `path[b, i]` slots behind its length; without a
        `path` they lie in order already, as a chain's do. A `path` must ascend and start with 0.
        """
        cache = self
        if path is not None and path.shape[1] > 1:
            # The first row of a path lies where it belongs.
            steps = jnp.arange(1, path.shape[1], dtype=jnp.int32)[None, :]
            source = self.length[:, None] + path[:, 1:]
            target = jnp.where(steps < count[:, None], self.length[:, None] + steps, self.capacity)
            rows = jnp.arange(path.shape[0], dtype=jnp.int32)[:, None]
            cache = self.replace(
                k=self.k.at[:, rows, :, :, target].set(
                    self.k.at[:, rows, :, :, source].get(mode="clip"), mode="drop"
                ),
                v=self.v.at[:, rows, :, target].set(
                    self.v.at[:, rows, :, source].get(mode="clip"), mode="drop"
                ),
            )
        return cache.replace(length=self.length + count)

    def grow(self, capacity: int) -> KVCache:
        """The same contents with more slots."""
        kept, more = [(0, 0)] * 3, (0, capacity - self.capacity)
        return self.replace(
            k=jnp.pad(self.k, [*kept, (0, 0), more]), v=jnp.pad(self.v, [*kept, more, (0, 0)])
        )


def bucket(needed: int, limit: int) -> int:
    """The capacity to use for `needed` slots: a power of two, so that few programs are compiled.

    No more than `limit` asks for (or `needed`, should that be over it), in whole smallest buckets.
    """
    capacity = _MIN_CAPACITY
    while capacity < needed:
        capacity *= 2
    return min(capacity, -(-max(limit, needed) // _MIN_CAPACITY) * _MIN_CAPACITY)
