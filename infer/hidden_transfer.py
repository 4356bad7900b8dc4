r"""Hidden Transfer on one page: every pass verifies a chain of guesses and makes the next ones.

    python infer/hidden_transfer.py --model models/smollm2-135m-instruct \
        --heads runs/hidden-transfer/heads --prompt "Why is the sky blue?"

Rows of the text pass all layers; half way up, maps make of each row k pseudo rows of the tokens
behind it, which pass the rest beside them and come out as guesses. `methods/hidden_transfer.py`
does it on the device, with trees, samples, batches, and a second schedule.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp

import mtd_jax as mtd
from mtd_jax.cli.page import encoded, prompt_parser, run, show
from mtd_jax.decoding.tree import TokenTree
from mtd_jax.decoding.verify import Verdict, walk
from mtd_jax.methods.transfer import HiddenTransferSpec, TransferWeights, Way
from mtd_jax.transformer.cache import KVCache
from mtd_jax.transformer.model import Parameters, embed, rows_behind, unembed
from mtd_jax.transformer.stack import decode_range


@functools.partial(jax.jit, static_argnames="way", donate_argnames="cache")
def passed(
    params: Parameters, weights: TransferWeights, way: Way, cache: KVCache, tokens: jax.Array
) -> tuple[jax.Array, jax.Array, KVCache]:
    """What the model says behind T tokens, [T], what it guesses behind that, [T, k], the cache."""
    config, count = params.config, tokens.shape[1]
    rows, slots = rows_behind(config, cache, count)
    layers = functools.partial(decode_range, config, params.blocks, rows=rows, slots=slots)
    x, cache = layers(cache, embed(params, tokens), 0, way.marks[0])
    pseudo = None
    for start, stop in way.stages(config):
        pseudo = way.entered(weights, x, pseudo, start)
        beside = way.beside(config, start, rows.positions, rows.mask, rows.keys)
        flat = pseudo.reshape(1, -1, config.hidden_size)
        both = jnp.concatenate([x, flat], axis=1)
        both, cache = layers(cache, both, start, stop, beside=beside)
        x, pseudo = both[:, :count], both[:, count:].reshape(pseudo.shape)
    assert pseudo is not None
    said, guessed = (jnp.argmax(unembed(params, rows), axis=-1) for rows in (x, pseudo))
    return said[0].astype(jnp.int32), guessed[0].astype(jnp.int32), cache


def verdict(rows: list[int], said: jax.Array) -> Verdict:
    """Which guesses the model would have said itself: `rows` are the newest token and k of them."""
    return walk(TokenTree.chain(len(rows) - 1), jnp.array([rows], jnp.int32), said[None])


def main() -> None:
    """Answers one prompt."""
    parser = prompt_parser(__doc__)
    parser.add_argument("--heads", required=True)
    args = parser.parse_args()

    model = mtd.load(args.model)
    heads = mtd.load_heads(args.heads, model)
    way = mtd.methods.spec_of(heads, HiddenTransferSpec).way(model.config)
    request = encoded(model, args)
    text, passes = list(request.token_ids), 1
    start, end, stops = len(text), len(text) + request.budget, set(model.eos_token_ids)
    slots = end + len(way.layers) + 1
    cache = KVCache.empty(model.config, 1, slots, model.params.embedding.dtype)
    forward = functools.partial(passed, model.params, heads.weights, way)

    said, guessed, cache = forward(cache, jnp.array([text], jnp.int32))
    cache = cache.commit(jnp.array([start], jnp.int32))
    text.append(int(said[-1]))
    guesses = guessed[-1].tolist()
    while len(text) < end and not stops & set(text[start:]):
        rows = [text[-1], *guesses]
        said, guessed, cache = forward(cache, jnp.array([rows], jnp.int32))
        found = verdict(rows, said)
        accepted = int(found.accepted[0])
        cache = cache.commit(found.accepted + 1)
        text += found.tokens[0, : accepted + 1].tolist()
        guesses = guessed[accepted].tolist()
        passes += 1
    show(model, text, request, passes)


if __name__ == "__main__":
    run(main, "hidden_transfer.py")
