"""Drafts that a part of the model draws, one behind the other."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp

from mtd_jax.decoding.method import DecodeState
from mtd_jax.decoding.penalties import penalized
from mtd_jax.decoding.sampling import drafting_rows, log_probabilities, sample
from mtd_jax.transformer.cache import KVCache
from mtd_jax.transformer.model import Parameters, unembed
from mtd_jax.typing import Array, Bool, Float, Int

DraftPass: TypeAlias = Callable[
    [KVCache, Int[Array, "B 1"], Bool[Array, " B"]], tuple[Float[Array, "B 1 D"], KVCache]
]
"""(cache, tokens, rows that take part) -> (what the last layer puts out, cache)."""


def draw_chain(
    params: Parameters,
    state: DecodeState,
    draft: DraftPass,
    most: int,
    limit: Int[Array, " B"],
    threshold: Float[Array, " B"],
) -> tuple[DecodeState, Int[Array, "B drafts"], Int[Array, " B"], Float[Array, "B drafts V"]]:
    """Draws up to `limit` <= `most` drafts of each row behind its pending token.

    A row's chain ends behind the first draft whose probability is under its `threshold`. Keys and
    values that `draft` writes lie behind the text, where verification overwrites them.

    Returns:
      the state, the drafts (-1: none), how many there are, and the log-probabilities that they were
      drawn from (zeros, if no row draws).
    """
    batch, vocab = state.pending.shape[0], params.config.vocab_size
    length, sampling = state.cache.length, state.requests.sampling
    drawing = drafting_rows(sampling, length)
    limit = jnp.minimum(limit, state.useful_drafts)
    any_sampled = jnp.any(sampling.temperature > 0)

    def unfinished(carry: Any) -> Bool[Array, ""]:
        going, done = carry[-2:]
        return (done < most) & jnp.any(going)

    def body(carry: Any) -> Any:
        cache, drafts, count, log_q, going, done = carry
        newest = jnp.where(done > 0, drafts[:, jnp.maximum(done - 1, 0)], state.pending)
        here = cache.replace(length=length + done)
        x, written = draft(here, jnp.maximum(newest, 0)[:, None], going)
        logits = penalized(unembed(params, x), sampling, state.history, drafts[:, None])[:, 0]
        token = sample(logits, drawing, length + done + 1)
        # Only draws need it later; a branch, because it is a pass over the vocabulary.
        q = jax.lax.cond(
            any_sampled,
            lambda: log_probabilities(logits, sampling),
            lambda: jnp.zeros((batch, vocab), jnp.float32),
        )
        drafts = drafts.at[:, done].set(jnp.where(going, token, -1))
        count = count + going.astype(jnp.int32)
        chosen = jnp.take_along_axis(logits, token[:, None], axis=1)[:, 0]
        sure = jnp.exp(chosen - jax.nn.logsumexp(logits, axis=-1)) >= threshold
        going = going & sure & (count < limit)
        return written, drafts, count, log_q.at[:, done].set(q), going, done + 1

    start = (
        state.cache,
        jnp.full((batch, most), -1, jnp.int32),
        jnp.zeros(batch, jnp.int32),
        jnp.zeros((batch, most, vocab), jnp.float32),
        state.active & (limit > 0),
        jnp.int32(0),
    )
    cache, drafts, count, log_q, _, _ = jax.lax.while_loop(unfinished, body, start)
    return state.replace(cache=cache.replace(length=length)), drafts, count, log_q
