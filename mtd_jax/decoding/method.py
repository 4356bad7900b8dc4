"""What every decoding method is, and the state that the engine hands it.

A method is a pytree: its own weights (heads) are leaves, its options static data. The engine calls
`prefill` once for a batch and `step` until all rows are done, and never asks which method it runs.
Training differentiates with respect to the method and leaves the base frozen by argument position.
"""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Callable
from typing import Any, ClassVar, Protocol, TypeAlias, runtime_checkable

import jax
import jax.numpy as jnp
from flax import struct

from mtd_jax.config import ModelConfig
from mtd_jax.decoding.penalties import History
from mtd_jax.decoding.sampling import SamplingRows
from mtd_jax.sharding import constrain
from mtd_jax.transformer.cache import KVCache
from mtd_jax.transformer.model import Parameters
from mtd_jax.typing import Array, Float, Int, Leaf


class Requests(struct.PyTreeNode):
    """What the rows of a batch ask for; all of it dynamic."""

    budget: Leaf
    """[B] int32: new tokens wanted; 0 marks a row that only fills up the batch."""
    stop_ids: Leaf
    """[stops] int32: ids that end a row; padded with -1, which no token has."""
    sampling: SamplingRows
    cycle: Any = None
    """[B] int32: tokens of a cycle (`dmtd`); 0, or None for all, is the method's own."""


class Tally(struct.PyTreeNode):
    """What has been drafted and accepted since the prompt was read; see docs/metrics.md."""

    forwards: Leaf
    """[B] int32: passes through the whole model that emitted tokens, the prompt's among them."""
    partial: Leaf
    """[B] int32: passes through a part of the layers: those that drafted, or late layers alone."""
    drafted: Leaf
    """[B] int32: drafts that were verified."""
    histogram: Leaf
    """[B, E] int32: steps with drafts, by how many of them were accepted."""

    @classmethod
    def empty(cls, batch: int, max_emit: int) -> Tally:
        """Nothing happened yet."""
        zeros = jnp.zeros(batch, jnp.int32)
        return cls(zeros, zeros, zeros, jnp.zeros((batch, max_emit), jnp.int32))

    def count(
        self,
        emitted: Int[Array, " B"],
        partial: Int[Array, " B"],
        drafted: Int[Array, " B"],
    ) -> Tally:
        """Adds a step; rows that emitted nothing did not take part."""
        took_part = emitted > 0
        spec = (took_part & (drafted > 0)).astype(jnp.int32)
        rows = jnp.arange(emitted.shape[0], dtype=jnp.int32)
        place = jnp.maximum(emitted - 1, 0)
        return Tally(
            forwards=self.forwards + took_part.astype(jnp.int32),
            partial=self.partial + jnp.where(took_part, partial, 0),
            drafted=self.drafted + spec * drafted,
            histogram=self.histogram.at[rows, place].add(spec),
        )


class DecodeState(struct.PyTreeNode):
    """Where a batch stands between two steps."""

    cache: KVCache
    text: Leaf
    """[B, S + 1] int32: the tokens themselves, prompt and answer; one more than the cache has
    slots, because the pending token is among them. What lies behind that is not defined."""
    prompt_length: Leaf
    """[B] int32"""
    pending: Leaf
    """[B] int32: the newest token of each row: emitted, but not in the cache yet."""
    emitted: Leaf
    """[B, E] int32: what the last step emitted; a row's first `emitted_count` entries count."""
    emitted_count: Leaf
    """[B] int32"""
    partial: Leaf
    """[B] int32: passes of the last step through a part of the layers."""
    drafted: Leaf
    """[B] int32: drafts that the last step verified."""
    tally: Tally
    active: Leaf
    """[B] bool: rows that still want tokens; the others write and emit nothing."""
    requests: Requests
    """`requests.budget` counts down to the tokens still wanted."""
    extra: Any = None
    """Whatever else the method keeps between steps: arrays [B, ...]."""

    @property
    def useful_drafts(self) -> Int[Array, " B"]:
        """Accepted drafts that a pass may still emit: one of the tokens wanted is its own."""
        budget: jax.Array = self.requests.budget
        return jnp.maximum(budget - 1, 0)

    @property
    def history(self) -> History:
        """The text of every row, its pending token included."""
        return History(self.text, self.cache.length + 1, self.prompt_length)

    def grow(self, capacity: int) -> DecodeState:
        """The same with more cache slots."""
        more = capacity - self.cache.capacity
        return self.replace(
            cache=self.cache.grow(capacity), text=jnp.pad(self.text, [(0, 0), (0, more)])
        )

    def placed(self) -> DecodeState:
        """The state with its layout over the mesh pinned, so that every call finds it the same."""
        cache = self.cache.replace(
            k=constrain(self.cache.k, "layers", "batch", "kv_heads", None, None),
            v=constrain(self.cache.v, "layers", "batch", "kv_heads", None, None),
            length=constrain(self.cache.length, "batch"),
        )
        requests = self.requests.replace(
            budget=constrain(self.requests.budget, "batch"),
            stop_ids=constrain(self.requests.stop_ids, None),
            sampling=_by_row(self.requests.sampling),
            cycle=_by_row(self.requests.cycle),
        )
        # All else has a row for every row of the batch.
        names = [f.name for f in dataclasses.fields(self) if f.name not in ("cache", "requests")]
        rest = {name: _by_row(getattr(self, name)) for name in names}
        return self.replace(cache=cache, requests=requests, **rest)


Extend: TypeAlias = Callable[..., tuple[jax.Array, KVCache]]
"""How rows pass the layers: `transformer.model.extend`, or what a method has in its place."""

Output: TypeAlias = Callable[[Parameters, Float[Array, "*rows D"]], Float[Array, "*rows V"]]
"""Float32 logits of what is decoded, from the last layer's output: `transformer.model.unembed`, or
what a method has in its place."""


def _by_row(tree: Any) -> Any:
    return jax.tree.map(lambda x: constrain(x, "batch", *[None] * (x.ndim - 1)), tree)


@runtime_checkable
class Method(Protocol):
    """A way to decode; implementations are `flax.struct.PyTreeNode`s in `mtd_jax.methods`."""

    name: ClassVar[str]
    """The command line's name for it."""

    has_cycles: ClassVar[bool]
    """Whether prompts may ask for a cycle."""

    @property
    def lossless(self) -> bool:
        """Whether what it emits is distributed as plain decoding's."""

    @property
    def max_emit(self) -> int:
        """E: the most tokens that a step emits for one row."""

    @property
    def rows_per_step(self) -> int:
        """The most cache slots that a step writes behind a row's committed length."""

    def partial_bytes(self, params: Parameters, cached: float) -> float:
        """Bytes that one of the `Tally.partial` passes reads.

        Args:
          cached: bytes of keys and values that a pass through all layers reads.
        """

    def check(self, config: ModelConfig, cycles: frozenset[int]) -> str | None:
        """Looks whether the method fits a model, before anything runs.

        Args:
          cycles: those that prompts ask for.

        Returns:
          what the user should know, if anything.

        Raises:
          InputError: it does not fit.
        """

    def plain(self) -> Method | None:
        """Whose greedy tokens it emits where it is lossless; None: plain decoding's."""

    def output(self, params: Parameters, x: Float[Array, "*rows D"]) -> Float[Array, "*rows V"]:
        """Logits of what is decoded, from the last layer's output; the model's own, mostly."""

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

        Moves `cache.length` by as many, and says in `drafted` how many drafts it verified and in
        `partial` how many passes through a part of the layers it took. May overshoot a budget or a
        stop id: the engine cuts what was emitted. The engine keeps `text`, `tally` and `requests`.
        """


def check(method: Method, config: ModelConfig, cycles: frozenset[int] = frozenset()) -> None:
    """`Method.check`, its notice given as a warning to the caller's caller."""
    notice = method.check(config, cycles)
    if notice is not None:
        warnings.warn(notice, UserWarning, stacklevel=3)
