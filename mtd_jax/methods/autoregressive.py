"""One token a step, from the base model alone: what every other method is measured against."""

from __future__ import annotations

from typing import ClassVar

import jax.numpy as jnp

from mtd_jax.decoding.base_method import BaseMethod
from mtd_jax.decoding.method import DecodeState
from mtd_jax.decoding.penalties import penalized
from mtd_jax.decoding.sampling import sample
from mtd_jax.transformer.model import Parameters, extend, unembed


class Autoregressive(BaseMethod):
    """Plain decoding; no weights of its own and no options."""

    name: ClassVar[str] = "ar"
    lossless: ClassVar[bool] = True

    @property
    def max_emit(self) -> int:
        """One token a step."""
        return 1

    def step(self, params: Parameters, state: DecodeState) -> DecodeState:
        """Runs the pending token of every row and draws the next one."""
        x, cache = extend(params, state.cache, state.pending[:, None], active=state.active)
        count = state.active.astype(jnp.int32)
        cache = cache.commit(count)
        sampling = state.requests.sampling
        logits = penalized(unembed(params, x), sampling, state.history)[:, 0]
        token = sample(logits, sampling, cache.length)
        return state.replace(
            cache=cache,
            pending=jnp.where(state.active, token, state.pending),
            emitted=token[:, None],
            emitted_count=count,
        )
