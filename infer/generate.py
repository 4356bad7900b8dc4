"""Decoding on one page, with the pure functions that the engine is made of.

    python infer/generate.py --model models/smollm2-135m-instruct --prompt "Why is the sky blue?"

A method reads the prompt (`prefill`) and then emits tokens (`step`); both are pure functions of
parameters and state, so the loop around them is ours to write and to jit. The library's own loop
(`mtd_jax/decoding/engine.py`) runs many steps a call and adds budgets, stop ids, growth, streaming.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

import mtd_jax as mtd
from mtd_jax.cli.page import make_parser, run
from mtd_jax.decoding.method import DecodeState, Method, Requests
from mtd_jax.decoding.requests import encode
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
    parser = make_parser(__doc__)
    parser.add_argument("--model", required=True)
    parser.add_argument("--prompt", required=True)
    parser.add_argument("--max-new-tokens", type=int, default=128)
    parser.add_argument("--temperature", type=float, default=0.0)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()

    sampling = mtd.Sampling(temperature=args.temperature, seed=args.seed)
    model = mtd.load(args.model)
    prompt = mtd.Prompt("0", text=args.prompt, max_new_tokens=args.max_new_tokens)
    request = encode(prompt, model.config, model.tokenizer, max_new_tokens=0, chat=None)
    assert model.tokenizer is not None  # `encode` takes no text without one
    method = mtd.methods.autoregressive()
    budget, stop_ids = jnp.array([request.budget]), jnp.array(model.eos_token_ids, jnp.int32)
    requests = Requests(budget, stop_ids, SamplingRows.of([sampling]))

    # Jitted once, out here: a function jitted inside a loop would be compiled in every round.
    read = jax.jit(prefill, static_argnames="capacity")
    advance = jax.jit(step, donate_argnames="state")

    tokens = jnp.array([request.token_ids], jnp.int32)
    state = read(method, model.params, tokens, requests, tokens.shape[1] + request.budget)
    text = TextStream(model.tokenizer)
    for _ in range(request.budget):
        token = int(state.pending[0])
        if token in model.eos_token_ids:
            break
        print(text.push([token]), end="", flush=True)
        state = advance(method, model.params, state)
    print(text.flush())


if __name__ == "__main__":
    run(main, "generate.py")
