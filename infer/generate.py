"""Decoding on one page, with the pure functions that the engine is made of.

    python infer/generate.py --model models/smollm2-135m-instruct --prompt "Why is the sky blue?"

A method reads the prompt (`prefill`) and then emits tokens (`step`); both are pure functions of
parameters and state, so the loop around them is ours to write and to jit. The library's own loop
(`mtd_jax/decoding/engine.py`) runs many steps a call and adds budgets, stop ids, growth, streaming.
"""

from __future__ import annotations

import argparse

import jax
import jax.numpy as jnp

import mtd_jax as mtd
from mtd_jax.decoding.method import DecodeState, Method, Requests
from mtd_jax.decoding.sampling import SamplingRows
from mtd_jax.tokenizer import TextStream
from mtd_jax.transformer.model import Parameters


def prefill(
    method: Method, params: Parameters, tokens: jax.Array, requests: Requests, capacity: int
) -> DecodeState:
    """Reads a [1, P] prompt into a cache of `capacity` slots and draws the first token."""
    lengths = jnp.full(1, tokens.shape[1], jnp.int32)
    return method.prefill(params, tokens, lengths, requests, capacity)


def step(method: Method, params: Parameters, state: DecodeState) -> DecodeState:
    """Draws the next token; the state is given away, so the cache is updated in place."""
    return method.step(params, state)


def main() -> None:
    """Answers one prompt."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--model", required=True)
    parser.add_argument("--prompt", required=True)
    parser.add_argument("--max-new-tokens", type=int, default=128)
    parser.add_argument("--temperature", type=float, default=0.0)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()

    model = mtd.load(args.model)
    if model.tokenizer is None:
        raise SystemExit(f"{args.model} has no tokenizer")
    method = mtd.methods.autoregressive()
    ids = model.tokenizer.chat([{"role": "user", "content": args.prompt}])
    sampling = mtd.Sampling(temperature=args.temperature, seed=args.seed)
    requests = Requests(
        budget=jnp.array([args.max_new_tokens], jnp.int32),
        stop_ids=jnp.array(model.config.eos_token_ids, jnp.int32),
        sampling=SamplingRows.of([sampling]),
    )

    # Jitted once, out here: a function jitted inside a loop would be compiled in every round.
    read = jax.jit(prefill, static_argnames="capacity")
    advance = jax.jit(step, donate_argnames="state")

    tokens = jnp.array([ids], jnp.int32)
    state = read(method, model.params, tokens, requests, len(ids) + args.max_new_tokens)
    text = TextStream(model.tokenizer)
    for _ in range(args.max_new_tokens):
        token = int(state.pending[0])
        if token in model.config.eos_token_ids:
            break
        print(text.push([token]), end="", flush=True)
        state = advance(method, model.params, state)
    print(text.flush())


if __name__ == "__main__":
    main()
