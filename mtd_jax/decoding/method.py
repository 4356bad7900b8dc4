"""What every decoding method is, and the state that the engine hands it.

A method is a pytree: its own weights (heads) are leaves, its options static data. The engine calls
`prefill` once for a batch and `step` until all rows are done, and never asks which method it runs.
Training differentiates with respect to the method and leaves the base frozen by argument position.
"""

from __future__ import annotations

from typing import Any, ClassVar, Protocol, runtime_checkable

import jax.numpy as jnp
from flax import struct

from mtd_jax.decoding.sampling import SamplingRows
from mtd_jax.sharding import constrain
from mtd_jax.transformer.cache import KVCache
from mtd_jax.transformer.model import Parameters
from mtd_jax.typing import Array, Int, Leaf


class Requests(struct.PyTreeNode):
    """What the rows of a batch ask for; all of it dynamic."""

    budget: Leaf
    """[B] int32: new tokens wanted; 0 marks a row that only fills up the batch."""
    stop_ids: Leaf
    """[stops] int32: ids that end a row; padded with -1, which no token has."""
    sampling: SamplingRows


class DecodeState(struct.PyTreeNode):
    """Where a batch stands between two steps."""

    cache: KVCache
    pending: Leaf
    """[B] int32: the newest token of each row: emitted, but not in the cache yet."""
    emitted: Leaf
    """[B, E] int32: what the last step emitted; a row's first `emitted_count` entries count."""
    emitted_count: Leaf
    """[B] int32"""
    active: Leaf
    """[B] bool: rows that still want tokens; the others write and emit nothing."""
    requests: Requests
    """`requests.budget` counts down to the tokens still wanted."""
    extra: Any = None
    """Whatever else the method keeps between steps."""

    def placed(self) -> DecodeState:
        """The state with its layout over the mesh pinned, so that every call finds it the same."""
        cache = self.cache.replace(
            k=constrain(self.cache.k, "layers", "batch", "kv_heads", None, None),
            v=constrain(self.cache.v, "layers", "batch", "kv_heads", None, None),
            length=constrain(self.cache.length, "batch"),
        )
        sampling = self.requests.sampling
        sampling = sampling.replace(
            temperature=constrain(sampling.temperature, "batch"),
            top_k=constrain(sampling.top_k, "batch"),
            top_p=constrain(sampling.top_p, "batch"),
            min_p=constrain(sampling.min_p, "batch"),
            key=constrain(sampling.key, "batch", None),
        )
        return self.replace(
            cache=cache,
            pending=constrain(self.pending, "batch"),
            emitted=constrain(self.emitted, "batch", None),
            emitted_count=constrain(self.emitted_count, "batch"),
            active=constrain(self.active, "batch"),
            requests=self.requests.replace(
                budget=constrain(self.requests.budget, "batch"),
                stop_ids=constrain(self.requests.stop_ids, None),
                sampling=sampling,
            ),
        )


@runtime_checkable
class Method(Protocol):
    """A way to decode; implementations are `flax.struct.PyTreeNode`s in `mtd_jax.methods`."""

    name: ClassVar[str]
    """The command line's name for it."""

    @property
    def max_emit(self) -> int:
        """E: the most tokens that a step emits for one row."""

    @property
    def rows_per_step(self) -> int:
        """The most cache slots that a step writes behind a row's committed length."""

    def prefill(
        self,
        params: Parameters,
        tokens: Int[Array, "B P"],
        lengths: Int[Array, " B"],
        requests: Requests,
        capacity: int,
    ) -> DecodeState:
        """Reads the prompts (padded behind their `lengths`) and emits the first token of each.

        `capacity` is the static number of cache slots; P <= capacity.
        """

    def step(self, params: Parameters, state: DecodeState) -> DecodeState:
        """Emits 1..E tokens for every active row, none for the others.

        May overshoot a budget or a stop id: the engine cuts what was emitted.
        """


def first_state(
    cache: KVCache,
    token: Int[Array, " B"],
    requests: Requests,
    max_emit: int,
    extra: Any = None,
) -> DecodeState:
    """The state after a prompt whose first new `token` has been drawn."""
    active = requests.budget > 0
    emitted = jnp.zeros((token.shape[0], max_emit), jnp.int32).at[:, 0].set(token)
    return DecodeState(
        cache=cache,
        pending=token,
        emitted=emitted,
        emitted_count=active.astype(jnp.int32),
        active=active,
        requests=requests,
        extra=extra,
    )
