r"""How fast `mtd distill-data` answers, by batch size, and how many of a batch's rows are at work.

    python -m benchmarks.answering --model models/smollm2-135m-instruct \
        --prompts benchmarks/prompts/spec_bench_dev.jsonl \
        --out benchmarks/results/cpu-answering.json

Sizes follow each other on the same prompts, plain decoding, the recipe's mix of temperatures; the
machine must be otherwise idle. `rows_at_work` is the tokens written over those that as many steps
of whole batches would write: what is missing to 1 is lost on rows that have ended.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import mtd_jax as mtd
from benchmarks.shapes import whole_numbers
from mtd_jax.cli.page import make_parser, run
from mtd_jax.cli.session import use_compilation_cache
from mtd_jax.convert.atomic import write_file
from mtd_jax.decoding.requests import read_prompts
from mtd_jax.evaluation import environment
from mtd_jax.training.distill import Plan, Recipe, answer, batches, make_plan


def main() -> None:
    """Measures, prints, writes."""
    parser = make_parser(__doc__)
    parser.add_argument("--model", required=True)
    parser.add_argument("--prompts", type=Path, required=True)
    parser.add_argument("--limit", type=int, default=32, help="prompts (default: 32)")
    parser.add_argument("--max-new-tokens", type=int, default=64)
    parser.add_argument("--batch-sizes", type=whole_numbers, default=[1, 4, 8, 16, 32])
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    use_compilation_cache()
    model = mtd.load(args.model)
    prompts = read_prompts(args.prompts)
    chosen = prompts[:: max(1, len(prompts) // args.limit)][: args.limit]
    plan = make_plan(model, chosen, Recipe(max_new_tokens=args.max_new_tokens))
    rows = []
    for size in args.batch_sizes:
        rows.append(_row(model, plan, size))
        print(json.dumps(rows[-1]), flush=True)
    result = {
        "hardware": environment.hardware(),
        "versions": environment.versions(),
        **environment.provenance(),
        "dtype": str(model.params.embedding.dtype),
        "prompts": len(plan.tasks),
        "prompt_tokens": sum(len(task.token_ids) for task in plan.tasks),
        "rows": rows,
    }
    write_file(args.out, json.dumps(result, indent=2) + "\n")


def _row(model: mtd.LanguageModel, plan: Plan, size: int) -> dict[str, Any]:
    method = mtd.methods.autoregressive()
    parts, places = [], 0
    for batch in batches(plan.tasks, size):
        lines, metrics = answer(model, method, batch, size, lambda _: None)
        parts.append(metrics)
        places += size * max(len(line["token_ids"]) - line["prompt_tokens"] for line in lines)
    tokens, seconds = (sum(getattr(m, name) for m in parts) for name in ("tokens", "seconds"))
    return {
        "batch_size": size,
        "tokens": tokens,
        "seconds": round(seconds, 2),
        "prompt_seconds": round(sum(m.prompt_seconds for m in parts), 2),
        "tokens_per_second": round(tokens / seconds, 2),
        "rows_at_work": round(tokens / places, 3),
    }


if __name__ == "__main__":
    run(main, "answering.py")
