"""The decode loop: one bounded, donated `while_loop` that any method runs in.

The device runs up to `rounds` steps a call and puts what they emit into a buffer; the host drains
the buffer between calls. A short call streams and a long one does not, and it is the same program:
`rounds`, budgets, stop ids, seeds and sampling values are all dynamic.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from mtd_jax.backend import decode_options
from mtd_jax.decoding.method import DecodeState, Method, Requests
from mtd_jax.sharding import constrain, fetched
from mtd_jax.transformer.cache import bucket
from mtd_jax.transformer.model import Parameters
from mtd_jax.typing import Array, Int, Leaf

MAX_ROUNDS = 64
"""Steps that one call can run at most: the width of the output buffer in steps."""


class Output(struct.PyTreeNode):
    """Tokens emitted since the last drain."""

    tokens: Leaf
    """[B, W] int32: left-justified, W = MAX_ROUNDS * E."""
    count: Leaf
    """[B] int32"""


def prompt_capacity(params: Parameters, method: Method, padded_prompt: int) -> int:
    """The cache capacity to start with, for prompts padded to this length."""
    return bucket(padded_prompt + method.rows_per_step, _slots(params, method))


def start(
    method: Method,
    params: Parameters,
    tokens: Int[Array, "B P"],
    lengths: Int[Array, " B"],
    requests: Requests,
    capacity: int,
) -> tuple[DecodeState, Output]:
    """Reads the prompts; the output holds the first token of each row."""
    return _programs()[0](method, params, tokens, lengths, requests, capacity)


def run(
    method: Method,
    params: Parameters,
    state: DecodeState,
    rounds: int,
    keep: np.ndarray | None = None,
) -> tuple[DecodeState, Output]:
    """Runs up to `rounds` more steps; `state` is donated. Grows the cache first where it is full.

    Stops early when all rows are done or when the cache is full and can grow: call again until
    `state.active` is False everywhere. Rows where `keep` ([B] bool) is False are ended first.
    """
    if not 1 <= rounds <= MAX_ROUNDS:
        raise ValueError(f"rounds must be between 1 and {MAX_ROUNDS}, got {rounds}")
    _, step_program, grow_program = _programs()
    slots = _slots(params, method)
    if keep is None:
        keep = np.ones(state.active.shape, np.bool_)
    active, length = fetched((state.active, state.cache.length))
    lengths = np.where(active & keep, length, 0)
    needed = int(lengths.max()) + method.rows_per_step
    if needed > state.cache.capacity:
        state = grow_program(state, bucket(needed, slots))
    limit = state.cache.capacity - method.rows_per_step
    bounds = np.array([rounds, limit], np.int32)
    return step_program(method, params, state, keep, bounds)


def lower_start(
    method: Method,
    params: Parameters,
    tokens: Int[Array, "B P"],
    lengths: Int[Array, " B"],
    requests: Requests,
    capacity: int,
    platform: str | None = None,
) -> jax.stages.Lowered:
    """The reading of prompts, lowered but not run; see `lower_run`."""
    return _programs(platform)[0].lower(method, params, tokens, lengths, requests, capacity)


def lower_run(
    method: Method, params: Parameters, state: DecodeState, platform: str | None = None
) -> jax.stages.Lowered:
    """The decode loop, lowered but not run: for looking at memory and collectives.

    All arguments may be abstract (`jax.ShapeDtypeStruct`), also for devices that are not there; of
    what kind those are must then be said (`platform`).
    """
    keep = jax.ShapeDtypeStruct(state.active.shape, jnp.bool)
    bounds = jax.ShapeDtypeStruct((2,), jnp.int32)
    return _programs(platform)[1].lower(method, params, state, keep, bounds)


def _slots(params: Parameters, method: Method) -> int:
    """The most cache slots a row can ever need: the context, and one step beyond its end."""
    return params.config.context_length + method.rows_per_step


@functools.cache
def _programs(platform: str | None = None) -> tuple[Any, Any, Any]:
    """The jitted programs, made once, when the backend is known."""
    return (
        jax.jit(_start, static_argnames="capacity"),
        jax.jit(_run, donate_argnames="state", compiler_options=decode_options(platform)),
        jax.jit(_grow, static_argnames="capacity"),  # nothing to donate: every size changes
    )


def _start(
    method: Method,
    params: Parameters,
    tokens: jax.Array,
    lengths: jax.Array,
    requests: Requests,
    capacity: int,
) -> tuple[DecodeState, Output]:
    state = _settle(method.prefill(params, tokens, lengths, requests, capacity))
    return state.placed(), _append(_empty_output(method, tokens.shape[0]), state)


def _run(
    method: Method, params: Parameters, state: DecodeState, keep: jax.Array, bounds: jax.Array
) -> tuple[DecodeState, Output]:
    rounds, limit = bounds[0], bounds[1]
    state = state.replace(active=state.active & keep)

    def unfinished(carry: tuple[DecodeState, Output, jax.Array]) -> jax.Array:
        state, _, done = carry
        fits = jnp.max(jnp.where(state.active, state.cache.length, 0)) <= limit
        return (done < rounds) & jnp.any(state.active) & fits

    def step(
        carry: tuple[DecodeState, Output, jax.Array],
    ) -> tuple[DecodeState, Output, jax.Array]:
        state, output, done = carry
        state = _settle(method.step(params, state)).placed()
        return state, _append(output, state), done + 1

    empty = _empty_output(method, state.pending.shape[0])
    state, output, _ = jax.lax.while_loop(unfinished, step, (state, empty, jnp.int32(0)))
    return state.placed(), output


def _grow(state: DecodeState, capacity: int) -> DecodeState:
    return state.grow(capacity).placed()


def _settle(state: DecodeState) -> DecodeState:
    """Books what a step emitted, cut at the budget and behind a stop id, which end the row."""
    tally = state.tally.count(state.emitted_count, state.partial, state.drafted)
    budget, stop_ids = state.requests.budget, state.requests.stop_ids
    index = jnp.arange(state.emitted.shape[1], dtype=jnp.int32)[None, :]
    counted = index < state.emitted_count[:, None]
    stops = counted & jnp.any(state.emitted[:, :, None] == stop_ids[None, None, :], axis=-1)
    width = state.emitted.shape[1]
    first_stop = jnp.min(jnp.where(stops, index, width), axis=1)
    count = jnp.minimum(jnp.minimum(state.emitted_count, budget), first_stop + 1)
    budget = budget - count
    # A stop id behind the budget's end was never emitted: only one inside `count` ends the row.
    ended = (budget <= 0) | (first_stop < count)
    return state.replace(
        emitted_count=count,
        active=state.active & ~ended,
        text=_written(state),
        tally=tally,
        requests=state.requests.replace(budget=budget),
    )


def _written(state: DecodeState) -> jax.Array:
    """The text with what was emitted behind it; the last emitted token is the pending one."""
    rows = jnp.arange(state.text.shape[0], dtype=jnp.int32)[:, None]
    index = jnp.arange(state.emitted.shape[1], dtype=jnp.int32)[None, :]
    first = state.cache.length + 1 - state.emitted_count
    place = jnp.where(
        index < state.emitted_count[:, None], first[:, None] + index, state.text.shape[1]
    )
    return state.text.at[rows, place].set(state.emitted, mode="drop")


def _empty_output(method: Method, batch: int) -> Output:
    width = MAX_ROUNDS * method.max_emit
    tokens = constrain(jnp.zeros((batch, width), jnp.int32), "batch", None)
    return Output(tokens=tokens, count=jnp.zeros(batch, jnp.int32))


def _append(output: Output, state: DecodeState) -> Output:
    rows = jnp.arange(output.count.shape[0], dtype=jnp.int32)[:, None]
    index = jnp.arange(state.emitted.shape[1], dtype=jnp.int32)[None, :]
    beyond = output.tokens.shape[1]
    place = jnp.where(index < state.emitted_count[:, None], output.count[:, None] + index, beyond)
    return Output(
        tokens=output.tokens.at[rows, place].set(state.emitted, mode="drop"),
        count=output.count + state.emitted_count,
    )
