"""Speculative decoding on one page: prompt lookup, verified by one pass over a chain of drafts.

    python infer/speculative.py --model models/smollm2-135m-instruct --prompt "Repeat: a b a b"

Guess the next tokens, run the model on all guesses at once, keep those that it would have said
itself. `mtd_jax/methods/prompt_lookup.py` does it on the device, samples, batches and adapts.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp

import mtd_jax as mtd
from mtd_jax.cli.page import encoded, prompt_parser, run, show
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
    parser = prompt_parser(__doc__)
    args = parser.parse_args()

    model = mtd.load(args.model)
    request = encoded(model, args)
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
    show(model, text, request, passes)


if __name__ == "__main__":
    run(main, "speculative.py")
