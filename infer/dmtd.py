"""Decoding in cycles (DMTD) on one page, one prompt, greedily.

    python infer/dmtd.py --model runs/dmtd-gsm8k/model --prompt "Tom has 3 apples. He eats one."

A head passes all layers, together with the tokens that have not been through the middle ones yet;
the next tokens of the cycle pass the late layers alone. `mtd_jax/methods/dmtd.py` does it on the
device, batches, samples, and knows early layers.
"""

from __future__ import annotations

import functools
import sys

import jax
import jax.numpy as jnp

import mtd_jax as mtd
from mtd_jax.cli.page import encoded, prompt_parser, run
from mtd_jax.transformer.cache import KVCache
from mtd_jax.transformer.model import Parameters, embed, extend, rows_behind, unembed
from mtd_jax.transformer.stack import decode_range


@functools.partial(jax.jit, static_argnames=("start", "stop"), donate_argnames="cache")
def layers(
    params: Parameters, cache: KVCache, x: jax.Array, at: jax.Array, start: int, stop: int
) -> tuple[jax.Array, KVCache]:
    """Layers start..stop-1 on rows [1, T, D] of which the first stands at position `at`."""
    rows, slots = rows_behind(params.config, cache.replace(length=at), x.shape[1])
    return decode_range(params.config, params.blocks, cache, x, start, stop, rows=rows, slots=slots)


def main() -> None:
    """Answers one prompt."""
    parser = prompt_parser(__doc__)
    parser.add_argument("--cycle", type=int, help="default: what the model was trained for")
    parser.add_argument("--late", type=int, help="default: what the model was trained for")
    args = parser.parse_args()

    model = mtd.load(args.model)
    params, config = model.params, model.config
    trained = config.cycles
    cycle = args.cycle if args.cycle is not None else trained.cycle if trained else 4
    method = mtd.methods.dmtd(cycle, late=args.late)
    notice = method.check(config, frozenset())  # refuses what these weights cannot be asked for
    groups = method.groups(config)
    if groups.early or groups.anchor != "prompt":
        raise mtd.InputError("this page knows no early layers, and cycles behind the prompt only")
    if notice is not None:
        print(f"dmtd.py: warning: {notice}", file=sys.stderr)
    first_late = config.num_layers - groups.late
    request = encoded(model, args)
    text, stops = list(request.token_ids), set(model.eos_token_ids)
    start, end = len(text), len(text) + request.budget

    # The prompt is read by all layers, as any decoder does.
    cache = KVCache.empty(config, 1, end + cycle, params.embedding.dtype)
    x, cache = extend(params, cache, jnp.array([text], jnp.int32))
    seen = start  # how many tokens the middle layers have seen
    text.append(int(unembed(params, x[:, -1]).argmax()))
    while len(text) < end and text[-1] not in stops:
        at = len(text) - 1
        x = embed(params, jnp.array([text[at:]], jnp.int32))
        if (at - start) % cycle == 0:
            waiting = embed(params, jnp.array([text[seen:]], jnp.int32))
            middle, cache = layers(params, cache, waiting, jnp.array([seen]), 0, first_late)
            x, seen = x + middle[:, -1:], at + 1
        late = (first_late, config.num_layers)
        x, cache = layers(params, cache, x, jnp.array([at]), *late)
        text.append(int(unembed(params, x[:, -1]).argmax()))
    new = text[start:]
    print(model.tokenizer.decode(new) if model.tokenizer is not None else new)
    heads = -(-(len(new) - 1) // cycle)
    print(f"[{len(new)} tokens, {heads} of them behind a pass through all layers]")


if __name__ == "__main__":
    run(main, "dmtd.py")
