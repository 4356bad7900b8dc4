"""Weight layouts and compiler options for CPU decoding: what `mtd_jax/backend.py` was chosen by.

    python benchmarks/layouts.py --dtype float32,bfloat16 --out results.json
    python benchmarks/layouts.py --flags xla_cpu_enable_fast_math=true --out results.json

Times the layers' four matrix products of SmolLM2-135M (425 MB in float32, no attention, no head),
one product after the other as in a model, for 1 to 32 rows. All variants and dtypes take turns
within a round; the best of the rounds is reported, in milliseconds. With --flags what was chosen is
measured beside itself with each further compiler option. `few_rows` is the package's own product
(`mtd_jax/kernels`), up to the number of rows that it is used for.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp

from mtd_jax.evaluation import environment
from mtd_jax.evaluation.roofline import memory_bandwidth
from mtd_jax.kernels import few_rows

LAYERS, WIDTH = 30, 576
MATRICES = ((576, 960), (576, 576), (576, 3072), (1536, 576))
ROWS = "1,2,4,8,16,32"
DTYPES = ("float32", "bfloat16")
WIDE = {"xla_cpu_prefer_vector_width": 512}
EIGEN = {"xla_cpu_experimental_ynn_fusion_type": ""}
Options: TypeAlias = dict[str, dict[str, int | str | bool]]
OPTIONS: Options = {
    "default": {},
    "wide vectors": dict(WIDE),
    "wide vectors, no YNNPACK": {**WIDE, **EIGEN},
}
CHOSEN = "one buffer a layer [in, out]"
KERNEL = f"{CHOSEN}, few_rows"
Product: TypeAlias = Callable[[jax.Array, jax.Array], jax.Array]


def transposed(x: jax.Array, weight: jax.Array) -> jax.Array:
    """The product with a weight that is stored [out, in]."""
    return x @ weight.T


def layer(x: jax.Array, weights: tuple[jax.Array, ...], times: Product) -> jax.Array:
    """The products of one layer, chained so that none can be left out."""
    qkv, out, gate_up, down = weights
    x = x + times(times(x, qkv)[:, :WIDTH], out)
    return x + times(jnp.tanh(times(x, gate_up)[:, :1536]), down)


def stacked(x: jax.Array, weights: tuple[jax.Array, ...], times: Product) -> jax.Array:
    """Layers picked out of [L, ...] stacks by a loop's index."""
    return jax.lax.fori_loop(
        0, LAYERS, lambda i, x: layer(x, tuple(w[i] for w in weights), times), x
    )


def unrolled(x: jax.Array, weights: tuple[Any, ...], times: Product) -> jax.Array:
    """One buffer a layer, all layers in the program."""
    for one in weights:
        x = layer(x, one, times)
    return x


def variants(dtype: str) -> dict[str, tuple[Callable[..., jax.Array], Any, Product]]:
    """Name -> (function, weights, what multiplies a row with one of them)."""
    keys = jax.random.split(jax.random.key(0), len(MATRICES))
    stacks = tuple(
        jax.random.normal(k, (LAYERS, *shape), dtype) * 0.01
        for k, shape in zip(keys, MATRICES, strict=True)
    )
    split = tuple(tuple(jnp.copy(w[i]) for w in stacks) for i in range(LAYERS))
    turned = tuple(tuple(jnp.copy(w.T) for w in one) for one in split)
    return {
        "stacked [in, out]": (stacked, stacks, jnp.matmul),
        CHOSEN: (unrolled, split, jnp.matmul),
        "one buffer a layer [out, in]": (unrolled, turned, transposed),
        KERNEL: (unrolled, split, few_rows.product),
    }


def programs(
    dtype: str, counts: list[int], options: Options
) -> Iterator[tuple[dict[str, Any], Any, Any, Any]]:
    """What is measured with its name: compiled function, rows, weights."""
    for name, (function, weights, times) in variants(dtype).items():
        if options is not OPTIONS and name != CHOSEN:
            continue
        for option, flags in options.items():
            for rows in counts:
                if name == KERNEL and (flags or not few_rows.takes(rows, dtype)):
                    continue
                x = jnp.ones((rows, WIDTH), dtype)
                jitted = jax.jit(function, static_argnums=2, compiler_options=flags)
                compiled = jitted.lower(x, weights, times).compile()
                label = {"dtype": dtype, "layout": name, "options": option, "rows": rows}
                yield label, compiled, x, weights


def measure(
    dtypes: list[str], counts: list[int], rounds: int, options: Options
) -> list[dict[str, Any]]:
    """Best time of every dtype, variant, option and number of rows."""
    measured = [program for dtype in dtypes for program in programs(dtype, counts, options)]
    best = [float("inf")] * len(measured)
    for _ in range(rounds):
        for i, (_, compiled, x, weights) in enumerate(measured):
            began = time.perf_counter()
            compiled(x, weights).block_until_ready()
            best[i] = min(best[i], time.perf_counter() - began)
    return [
        {**label, "ms": round(1e3 * seconds, 2)}
        for (label, *_), seconds in zip(measured, best, strict=True)
    ]


def names(text: str) -> list[str]:
    """`float32,bfloat16` as a list."""
    for name in text.split(","):
        if name not in DTYPES:
            raise argparse.ArgumentTypeError(f"'{name}' is none of {', '.join(DTYPES)}")
    return text.split(",")


def with_flags(text: str) -> Options:
    """What was chosen, and that with each of `a=1,b=text,c=true`, of which `+` joins several."""
    chosen = OPTIONS["wide vectors, no YNNPACK"]
    found: Options = {"chosen": dict(chosen)}
    for group in text.split(","):
        more: dict[str, int | str | bool] = {}
        for flag in group.split("+"):
            name, _, value = flag.partition("=")
            known = {"true": True, "false": False}
            more[name] = int(value) if value.isdecimal() else known.get(value, value)
        found[group] = {**chosen, **more}
    return found


def main() -> None:
    """Measures and prints a table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--dtype", type=names, default=["float32"], metavar="D,D,...")
    parser.add_argument("--rows", default=ROWS, metavar="N,N,...", help=f"default: {ROWS}")
    parser.add_argument("--flags", type=with_flags, default=OPTIONS, metavar="NAME=VALUE,...")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    bandwidth = memory_bandwidth()
    counts = [int(n) for n in args.rows.split(",")]
    rows = measure(args.dtype, counts, args.rounds, args.flags)
    bandwidth = max(bandwidth, memory_bandwidth())
    report = {
        "hardware": environment.hardware(),
        "versions": environment.versions(),
        **environment.provenance(),
        "bandwidth_gb_s": round(bandwidth / 1e9, 1),
        "weights": LAYERS * sum(a * b for a, b in MATRICES),
        "rows": rows,
    }
    for row in rows:
        what = f"{row['dtype']:8} {row['layout']:30} {row['options']:26} {row['rows']:3} rows"
        print(f"{what} {row['ms']:7.2f} ms")
    if args.out is not None:
        args.out.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
