r"""What a verifying step costs by its number of rows, one row being 1.

    python -m benchmarks.verify_cost --model models/smollm2-135m-instruct \
        --out benchmarks/results/cpu-verify-cost.json --plot docs/verify-cost-cpu.png
    python -m benchmarks.verify_cost --config configs/models/qwen3-4b.toml --dtype bfloat16 \
        --rows 1,8,16,32,64

The engine's own loop is timed: layers, head, masks, verification and commit of a chain. Row counts
take turns, so that all meet the same machine; a ratio is the median over the rounds. On a CPU the
package's own products of few rows (`mtd_jax/kernels`) take turns with XLA's.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import statistics
import time
from pathlib import Path
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

import mtd_jax as mtd
from benchmarks.shapes import add_model_arguments, given_model, whole_numbers
from mtd_jax.decoding import engine
from mtd_jax.decoding.base_method import BaseMethod
from mtd_jax.decoding.method import DecodeState, Requests
from mtd_jax.decoding.sampling import Sampling, SamplingRows
from mtd_jax.decoding.speculative import verify_drafts
from mtd_jax.decoding.tree import TokenTree
from mtd_jax.evaluation import environment
from mtd_jax.evaluation.plot import plot_step_cost
from mtd_jax.kernels import few_rows
from mtd_jax.transformer.model import Parameters


class Rows(BaseMethod):
    """A method that verifies the same number of rows in every step, and accepts none."""

    rows: int = struct.field(pytree_node=False)
    kernel: bool = struct.field(pytree_node=False, default=True)
    name: ClassVar[str] = "rows"
    lossless: ClassVar[bool] = True

    @property
    def max_emit(self) -> int:
        """Drafts and the bonus token."""
        return self.rows

    def step(self, params: Parameters, state: DecodeState) -> DecodeState:
        """Verifies rows without a draft on them, which costs what wrong drafts cost."""
        drafts = jnp.full((len(state.pending), self.rows - 1), -1, jnp.int32)
        with contextlib.nullcontext() if self.kernel else few_rows.left_out():
            return verify_drafts(params, state, TokenTree.chain(self.rows - 1), drafts)[0]


def measure(
    model: mtd.LanguageModel, methods: list[Rows], batch: int, prompt: int, steps: int, rounds: int
) -> list[list[float]]:
    """Milliseconds of a step of each, one value a round."""
    requests = Requests(
        budget=jnp.full(batch, 2**30, jnp.int32),
        stop_ids=jnp.full(8, -1, jnp.int32),
        sampling=SamplingRows.of([Sampling()] * batch),
    )
    tokens = np.random.default_rng(0).integers(0, model.config.vocab_size, (batch, prompt))
    lengths = np.full(batch, prompt, np.int32)
    found: list[list[float]] = [[] for _ in methods]
    # The same cache for all, whatever their rows: what differs is the rows alone.
    most = max(methods, key=lambda method: method.rows)
    capacity = engine.prompt_capacity(model.params, most, prompt + steps)
    states: list[Any] = []
    for method in methods:
        state, _ = engine.start(
            method,
            model.params,
            jnp.asarray(tokens, jnp.int32),
            jnp.asarray(lengths),
            requests,
            capacity,
        )
        states.append(state)
    for number in range(rounds + 1):  # the first one compiles
        for i, method in enumerate(methods):
            state = states[i].replace(cache=states[i].cache.replace(length=jnp.asarray(lengths)))
            jax.block_until_ready(state)
            began = time.perf_counter()
            states[i], output = engine.run(method, model.params, state, steps)
            jax.block_until_ready(output)
            if number:
                found[i].append(1e3 * (time.perf_counter() - began) / steps)
    return found


def main() -> None:
    """Measures, prints, writes."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    add_model_arguments(parser)
    parser.add_argument("--rows", type=whole_numbers, default=[1, 2, 4, 8, 16, 32, 64])
    parser.add_argument("--batch-size", type=int, default=1)
    parser.add_argument("--prompt-tokens", type=int, default=64)
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--plot", type=Path)
    args = parser.parse_args()
    model, name = given_model(args)
    batch, prompt = args.batch_size, args.prompt_tokens
    kinds = [True, False] if few_rows.takes(1, model.params.embedding.dtype) else [False]
    methods = [Rows(count, kernel) for count in args.rows for kernel in kinds]
    found = measure(model, methods, batch, prompt, args.steps, args.rounds)
    rows: list[dict[str, Any]] = []
    for method, times in zip(methods, found, strict=True):
        base = found[kinds.index(method.kernel)]  # the first number of rows, by the same products
        ratio = statistics.median(t / b for t, b in zip(times, base, strict=True))
        products = "few_rows" if method.kernel else "xla"
        rows.append(
            {
                "products": products,
                "rows": method.rows,
                "ms": round(statistics.median(times), 3),
                "best_ms": round(min(times), 3),
                "ratio": round(ratio, 3),
                "best_ratio": round(min(times) / min(base), 3),
            }
        )
        shown = f"{products:8} {method.rows:3} rows: {statistics.median(times):7.2f} ms"
        print(f"{shown}, {ratio:.2f}x", flush=True)
    report = {
        "hardware": environment.hardware(),
        "versions": environment.versions(),
        **environment.provenance(),
        "model": name,
        "dtype": str(model.params.embedding.dtype),
        "batch_size": args.batch_size,
        "prompt_tokens": args.prompt_tokens,
        "rows": rows,
    }
    if args.out is not None:
        args.out.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    if args.plot is not None:
        backend = report["hardware"]["backend"].upper()
        curves: dict[str, dict[int, float]] = {}
        for row in rows:
            label = f"{name}, {report['dtype']}, {backend}, {row['products']}"
            curves.setdefault(label, {})[row["rows"]] = row["ratio"]
        plot_step_cost(curves, args.plot)


if __name__ == "__main__":
    main()
