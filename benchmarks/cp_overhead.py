r"""What the heads of one step with CP drafts cost beside one row through the base's output head.

    python -m benchmarks.cp_overhead --model models/smollm2-135m-instruct \
        --out benchmarks/results/cpu-cp-overhead.json
    python -m benchmarks.cp_overhead --config configs/models/qwen3-4b.toml --dtype bfloat16

All r n heads read the base's output head once, or the columns of the tokens that they draft.
`bytes_ratio` is what they must read, maps of their own among it, over the output head alone;
`ratio` the time over that of one row through it (median of the rounds, taken in turns). What is
between the two is arithmetic: r n rows, not bytes.
"""

from __future__ import annotations

import functools
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from benchmarks.shapes import add_model_arguments, given_model
from mtd_jax.cli.page import make_parser, run
from mtd_jax.convert.atomic import write_file
from mtd_jax.decoding.draft_vocabulary import DraftVocabulary, bytes_read, reader_of
from mtd_jax.evaluation import environment
from mtd_jax.methods.cp_heads import CPSpec
from mtd_jax.methods.cp_weights import CPWeights
from mtd_jax.parameters import size_in_bytes
from mtd_jax.transformer.model import Parameters, project

SIZES = ((1, 4), (2, 4), (4, 4), (8, 4))
"""r and n."""


@jax.jit
def _output_head(params: Parameters, e: jax.Array) -> jax.Array:
    return project(params, e)


@jax.jit
def _heads(
    params: Parameters, drafted: DraftVocabulary | None, weights: CPWeights, e: jax.Array
) -> tuple[jax.Array, jax.Array]:
    return weights.log_w(e), weights.log_p(reader_of(drafted, params), e)


def main() -> None:
    """Measures, prints, writes."""
    parser = make_parser(__doc__)
    add_model_arguments(parser)
    parser.add_argument("--factor", type=int, default=64, help="rank of the maps (default: 64)")
    parser.add_argument("--vocabulary", type=int, default=8192, help="tokens drafted, beside all")
    parser.add_argument("--calls", type=int, default=20, help="of each in a round")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    model, name = given_model(args)
    result = {
        "hardware": environment.hardware(),
        "versions": environment.versions(),
        **environment.provenance(),
        "model": name,
        "dtype": str(model.params.embedding.dtype),
        "factor": args.factor,
        "rows": measure(model.params, args.factor, args.vocabulary, args.calls, args.rounds),
    }
    if args.out is not None:
        write_file(args.out, json.dumps(result, indent=2) + "\n")


def measure(
    params: Parameters, factor: int, vocabulary: int, calls: int, rounds: int
) -> list[dict[str, Any]]:
    """A line for each of `SIZES`, with all tokens drafted and with `vocabulary` of them."""
    config = params.config
    dtype = params.embedding.dtype
    head = bytes_read(None, params)
    e = jax.random.normal(jax.random.key(0), (1, config.hidden_size), dtype)
    some = DraftVocabulary.of(params, list(range(vocabulary)))
    made = {size: _weights(params, *size, factor, dtype) for size in SIZES}
    cases = [(size, drafted) for drafted in (None, some) for size in SIZES]
    work: list[Callable[[], Any]] = [functools.partial(_output_head, params, e)]
    work += [functools.partial(_heads, params, drafted, made[size], e) for size, drafted in cases]
    times: list[list[float]] = [[] for _ in work]
    for number in range(rounds + 1):  # the first one compiles
        for call, taken in zip(work, times, strict=True):
            began = time.perf_counter()
            jax.block_until_ready([call() for _ in range(calls)])
            if number:
                taken.append(1e3 * (time.perf_counter() - began) / calls)
    lines = []
    for (size, drafted), taken in zip(cases, times[1:], strict=True):
        ratio = statistics.median(t / h for t, h in zip(taken, times[0], strict=True))
        read = bytes_read(drafted, params) + size_in_bytes(made[size])
        lines.append(
            {
                "rank": size[0],
                "tokens": size[1],
                "vocabulary": config.vocab_size if drafted is None else vocabulary,
                "ms": round(statistics.median(taken), 3),
                "head_ms": round(statistics.median(times[0]), 3),
                "ratio": round(ratio, 3),
                "bytes_ratio": round(read / head, 3),
            }
        )
        print(json.dumps(lines[-1]), flush=True)
    return lines


def _weights(params: Parameters, rank: int, tokens: int, factor: int, dtype: Any) -> CPWeights:
    weights = CPSpec(rank=rank, tokens=tokens, factor=factor).initial(params, jax.random.key(1))
    return jax.tree.map(lambda x: jnp.asarray(x, dtype), weights)


if __name__ == "__main__":
    run(main, "cp_overhead.py")
