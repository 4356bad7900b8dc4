"""Speculative decoding on one page: prompt lookup, verified by one pass over a chain of drafts.

    python infer/speculative.py --model models/smollm2-135m-instruct --prompt "Repeat: a b a b"

Guess the next tokens, run the model on all guesses at once, keep those that it would have said
itself. `mtd_jax/methods/prompt_lookup.py` does it on the device, samples, batches and adapts.
"""

from __future__ import annotations

import argparse
import functools
import sys

import jax
import jax.numpy as jnp

import mtd_jax as mtd
from mtd_jax.decoding.requests import encode
from mtd_jax.decoding.tree import TokenTree
from mtd_jax.decoding.verify import Verdict, walk
from mtd_jax.transformer.cache import KVCache
from mtd_jax.transformer.model import Parameters, extend, unembed

DRAFTS = TokenTree.chain(7)


def lookup(text: list[int], count: int) -> list[int]:
    """What followed the last two tokens where they occurred first; -1 where nothing did."""
    places = (i + 2 for i in range(len(text) - 2) if text[i : i + 2] == text[-2:])
    at = next(places, len(text))
    return (text[at : at + count] + [-1] * count)[:count]


@functools.partial(jax.jit, donate_argnames="cache")
def verify(params: Parameters, cache: KVCache, rows: jax.Array) -> tuple[Verdict, KVCache]:
    """Runs the newest token and the drafts; commits what the model agrees with."""
    x, cache = extend(params, cache, jnp.maximum(rows, 0))
    said = jnp.argmax(unembed(params, x), axis=-1).astype(jnp.int32)
    verdict = walk(DRAFTS, rows, said)
    return verdict, cache.commit(verdict.accepted + 1)


def main() -> None:
    """Answers one prompt."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--model", required=True)
    parser.add_argument("--prompt")
    parser.add_argument("--token-ids", help="in place of --prompt: 5,6,7")
    parser.add_argument("--max-new-tokens", type=int, default=64)
    args = parser.parse_args()

    model = mtd.load(args.model)
    ids = args.token_ids and tuple(int(i) for i in args.token_ids.split(","))
    prompt = mtd.Prompt("0", text=None if ids else args.prompt, token_ids=ids or None)
    budget = args.max_new_tokens
    request = encode(prompt, model.config, model.tokenizer, max_new_tokens=budget, chat=None)
    text, passes = list(request.token_ids), 0
    start, end, stops = len(text), len(text) + request.budget, set(model.eos_token_ids)
    cache = KVCache.empty(model.config, 1, end + DRAFTS.size, model.params.embedding.dtype)
    # All but the newest token go into the cache; that one leads the first row of drafts.
    _, cache = extend(model.params, cache, jnp.array([text[:-1] or text], jnp.int32))
    cache = cache.commit(jnp.array([start - 1], jnp.int32))
    while len(text) < end and not stops & set(text[start:]):
        rows = [text[-1], *lookup(text, DRAFTS.max_depth)]
        verdict, cache = verify(model.params, cache, jnp.array([rows], jnp.int32))
        text += verdict.tokens[0, : int(verdict.accepted[0]) + 1].tolist()
        passes += 1
    # What was accepted behind the budget or an end token does not count.
    new = text[start : min([end] + [i + 1 for i in range(start, len(text)) if text[i] in stops])]
    print(model.tokenizer.decode(new) if model.tokenizer is not None else new)
    print(f"[{len(new)} tokens in {passes} passes: {len(new) / passes:.2f} tokens a pass]")


if __name__ == "__main__":
    try:
        main()
    except (mtd.InputError, ValueError, OSError) as error:
        print(f"speculative.py: error: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(2)
