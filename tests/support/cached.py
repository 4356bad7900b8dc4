"""Logits as decoding comes by them: prompts are read into a cache, the rest token by token."""

from __future__ import annotations

from functools import cache, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mtd_jax.backend import decode_options
from mtd_jax.decoding.prompt import read_prompt
from mtd_jax.transformer import model as transformer
from mtd_jax.transformer.cache import KVCache, bucket


def cached_logits(
    params: transformer.Parameters, tokens: np.ndarray, lengths: np.ndarray, steps: int
) -> np.ndarray:
    """Float32 logits [B, 1 + steps, V] at the last token of each prompt and at those behind it.

    The prompt of row b is `tokens[b, :lengths[b]]`, and `lengths[b] + steps` tokens are needed.
    The programs are compiled as the engine's are.
    """
    read, run = _programs()
    index = np.arange(tokens.shape[1])[None, :]
    # Zeros behind a prompt: a step that left its row unwritten would find something else there.
    prompts = np.where(index < lengths[:, None], tokens, 0).astype(np.int32)
    behind = np.take_along_axis(tokens, lengths[:, None] + np.arange(steps)[None, :], axis=1)
    first, state = read(params, prompts, lengths.astype(np.int32), bucket(index.size, 2**30))
    return np.concatenate([first, run(params, state, behind.astype(np.int32))], axis=1)


@cache
def _programs() -> tuple[Any, Any]:
    """Jitted once, when the backend is known."""
    return (
        jax.jit(_read, static_argnames="capacity"),
        jax.jit(_run, compiler_options=decode_options()),
    )


def _read(
    params: transformer.Parameters, tokens: jax.Array, lengths: jax.Array, capacity: int
) -> tuple[jax.Array, KVCache]:
    last, state = read_prompt(params, tokens, lengths, capacity)
    return transformer.unembed(params, last)[:, None], state


def _run(params: transformer.Parameters, state: KVCache, tokens: jax.Array) -> jax.Array:
    _, logits = jax.lax.scan(partial(_step, params), state, tokens.T)
    return logits.swapaxes(0, 1)


def _step(
    params: transformer.Parameters, state: KVCache, tokens: jax.Array
) -> tuple[KVCache, jax.Array]:
    x, state = transformer.extend(params, state, tokens[:, None])
    return state.commit(jnp.ones_like(tokens)), transformer.unembed(params, x[:, 0])
