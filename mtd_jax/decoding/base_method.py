"""What methods have in common: a prompt that is read, a first token, and what follows from it."""

from __future__ import annotations

import abc
from typing import Any, ClassVar

from flax import struct

from mtd_jax.config import ModelConfig
from mtd_jax.decoding.method import DecodeState, Method, Requests
from mtd_jax.decoding.prompt import first_state, read_prompt
from mtd_jax.errors import InputError
from mtd_jax.transformer.cache import KVCache
from mtd_jax.transformer.model import Parameters, unembed
from mtd_jax.typing import Array, Float, Int


class BaseMethod(struct.PyTreeNode, abc.ABC):
    """A `Method` but for its step; what is here is right for most."""

    name: ClassVar[str]
    has_cycles: ClassVar[bool] = False

    @property
    @abc.abstractmethod
    def max_emit(self) -> int:
        """E: the most tokens that a step emits for one row."""

    @property
    def rows_per_step(self) -> int:
        """A slot for every token; trees need more."""
        return self.max_emit

    def partial_bytes(self, params: Parameters, cached: float) -> float:
        """All passes run the whole model."""
        return 0.0

    def check(self, config: ModelConfig, cycles: frozenset[int]) -> str | None:
        """Fits every model; only DMTD has cycles."""
        if cycles:
            raise InputError(
                f"a prompt asks for a cycle of {min(cycles)}; {self.name} has no cycles"
            )
        return None

    def plain(self) -> Method | None:
        """Plain decoding, mostly."""
        return None

    def read(
        self,
        params: Parameters,
        tokens: Int[Array, "B P"],
        lengths: Int[Array, " B"],
        requests: Requests,
        capacity: int,
    ) -> tuple[Float[Array, "B W"], KVCache]:
        """What `kept` wants of each prompt's last row, and the cache; as any decoder.

        The last layer's output comes first; for most it is all (W = D).
        """
        return read_prompt(params, tokens, lengths, capacity)

    def output(self, params: Parameters, x: Float[Array, "*rows D"]) -> Float[Array, "*rows V"]:
        """Logits of what is decoded; the model's own."""
        return unembed(params, x)

    def kept(
        self,
        params: Parameters,
        last: Float[Array, "B W"],
        cache: KVCache,
        requests: Requests,
    ) -> Any:
        """`DecodeState.extra` behind the prompts; `last` and `cache` are what `read` found."""
        return None

    def prefill(
        self,
        params: Parameters,
        tokens: Int[Array, "B P"],
        lengths: Int[Array, " B"],
        requests: Requests,
        capacity: int,
    ) -> DecodeState:
        """Reads the prompts and draws the first token of each."""
        last, cache = self.read(params, tokens, lengths, requests, capacity)
        extra = self.kept(params, last, cache, requests)
        last, output = last[:, : params.config.hidden_size], self.output
        return first_state(params, last, cache, tokens, requests, self.max_emit, extra, output)

    @abc.abstractmethod
    def step(self, params: Parameters, state: DecodeState) -> DecodeState:
        """See `Method.step`."""
