"""Decoding with CP heads on one page: one prompt, greedily, a chain of drafts.

    python infer/cp.py --model models/smollm2-135m-instruct --heads runs/cp/heads --prompt "Hello"

One pass verifies the drafts of the step before and leaves the row that the next ones come from.
Where heads were trained with their model, what is decoded is the mixture's own first token.
`mtd_jax/methods/cp_drafting.py` does it on the device, samples, batches, drafts trees and adapts.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp

import mtd_jax as mtd
from mtd_jax.cli.page import encoded, prompt_parser, run, show
from mtd_jax.decoding.draft_vocabulary import (
    DraftVocabulary,
    columns_of,
    reader_of,
    tokens_of,
)
from mtd_jax.decoding.tree import TokenTree
from mtd_jax.decoding.verify import walk
from mtd_jax.methods import cp_mixture
from mtd_jax.methods.cp_weights import CPWeights
from mtd_jax.transformer.cache import KVCache
from mtd_jax.transformer.model import Parameters, extend, normed, unembed


@jax.jit
def draft(
    heads: CPWeights,
    drafted: DraftVocabulary | None,
    params: Parameters,
    row: jax.Array,
    newest: jax.Array,
) -> jax.Array:
    """The newest token, and the likeliest ones behind it, each given those before it."""
    e = normed(params, row)
    # [r] and [r, n, N]: of all tokens, or of those that are drafted.
    log_pi, tables = heads.log_w(e), heads.log_p(reader_of(drafted, params), e)
    tokens = [newest]
    for step in range(1, tables.shape[1]):
        log_pi = cp_mixture.seen(log_pi, tables[:, step - 1], columns_of(drafted, tokens[-1]))
        best = jnp.argmax(cp_mixture.mixed(log_pi, tables[:, step]))
        tokens.append(tokens_of(drafted, best).astype(jnp.int32))
    return jnp.stack(tokens)


@jax.jit
def first_token(own: CPWeights | None, params: Parameters, x: jax.Array) -> jax.Array:
    """The likeliest next token behind each row: the model's own, or that of the mixture `own`."""
    if own is None:
        logits = unembed(params, x)
    else:
        e = normed(params, x)
        logits = cp_mixture.mixed(own.log_w(e), own.first(1).log_p(params, e)[..., 0, :])
    return jnp.argmax(logits, axis=-1).astype(jnp.int32)


@functools.partial(jax.jit, donate_argnames="cache")
def verify(
    own: CPWeights | None, params: Parameters, cache: KVCache, tokens: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array, KVCache]:
    """What is really said, how many drafts that keeps, the row behind them."""
    x, cache = extend(params, cache, tokens[None])
    said = first_token(own, params, x)
    verdict = walk(TokenTree.chain(tokens.shape[0] - 1), tokens[None], said)
    kept = verdict.accepted[0]
    return verdict.tokens[0], kept, x[0, kept], cache.commit(verdict.accepted + 1)


def main() -> None:
    """Answers one prompt."""
    parser = prompt_parser(__doc__)
    parser.add_argument("--heads", required=True, help="directory that `mtd train` wrote")
    args = parser.parse_args()

    model = mtd.load(args.model)
    heads = mtd.load_heads(args.heads, model)
    together = mtd.methods.cp(heads, tree="chain").marginal  # refuses heads of another method
    own = heads.weights if together else None
    request = encoded(model, args)
    text, passes = list(request.token_ids), 1
    start, end, stops = len(text), len(text) + request.budget, set(model.eos_token_ids)
    drafts = heads.options.get("tokens", 4)
    cache = KVCache.empty(model.config, 1, end + drafts, model.params.embedding.dtype)
    x, cache = extend(model.params, cache, jnp.array([text], jnp.int32))
    cache, row = cache.commit(jnp.array([start])), x[0, -1]
    text.append(int(first_token(own, model.params, row)))
    while len(text) < end and not stops & set(text[start:]):
        tokens = draft(heads.weights, heads.vocabulary, model.params, row, jnp.int32(text[-1]))
        said, kept, row, cache = verify(own, model.params, cache, tokens)
        text += said[: int(kept) + 1].tolist()
        passes += 1
    show(model, text, request, passes)


if __name__ == "__main__":
    run(main, "cp.py")
