r"""Every lossless method beside plain decoding on many prompts: the same tokens?

    python benchmarks/lossless.py --model models/smollm2-135m-instruct \
        --prompts benchmarks/prompts/spec_bench_dev.jsonl --out benchmarks/results/cpu-lossless.json

What `mtd verify` does, with plain decoding run once for all methods, in the same batches (`mtd
verify` reads every prompt alone). An hour on two cores; the same command goes on behind the methods
that it has left in `--out`.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import mtd_jax as mtd
from mtd_jax.cli.arguments import parse_options
from mtd_jax.cli.session import choose_method
from mtd_jax.convert.atomic import write_file
from mtd_jax.decoding.method import Method
from mtd_jax.decoding.requests import encode, read_prompts
from mtd_jax.evaluation import environment
from mtd_jax.evaluation.losslessness import LosslessReport, compare

METHODS = (
    "ngram",
    "ngram:branches=2x2",
    "prompt_lookup",
    "self_speculative:drafts=3",
    "medusa:tree=2x2x1",
    "hidden_transfer:tree=2x2x1",
    "cp:tree=2x2x1",
    "hydra:tree=2x2x1:copy=true",
)
"""As in `mtd bench --methods`: `auto` where it drafts on CPUs, else drafts in every step."""


def main() -> None:
    """Measures, prints, writes."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--model", required=True)
    parser.add_argument("--prompts", type=Path, required=True)
    parser.add_argument("--methods", nargs="+", default=METHODS, metavar="METHOD")
    parser.add_argument("--skip", default="configs/methods/smollm2-135m-self-speculative")
    parser.add_argument("--max-new-tokens", type=int, default=48)
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    model = mtd.load(args.model)
    prompts = read_prompts(args.prompts)
    budget, size = args.max_new_tokens, args.batch_size

    def answers(method: Method) -> list[mtd.Completion]:
        return mtd.generate(model, method, prompts, max_new_tokens=budget, batch_size=size)

    ids = [
        encode(p, model.config, model.tokenizer, max_new_tokens=budget, chat=None).token_ids
        for p in prompts
    ]
    rows = _done(args)
    left = [label for label in args.methods if label not in {row["method"] for row in rows}]
    plain = answers(mtd.methods.autoregressive()) if left else []
    for label in left:
        name, *options = label.split(":")
        heads = args.skip if name == "self_speculative" else None
        chosen = choose_method(name, heads, parse_options(options), label)
        method = chosen.made(model)
        done = answers(method)
        triples = zip(ids, done, plain, strict=True)
        report = LosslessReport([compare(model, *triple, method) for triple in triples]).to_dict()
        parted = [c for c in report.pop("comparisons") if not c["identical"]]
        rows.append({"method": label, **report, "parted": parted})
        print(label, report, flush=True)
        result = {**_conditions(args), "dtype": str(model.params.embedding.dtype), "rows": rows}
        write_file(args.out, json.dumps(result, indent=2) + "\n")


def _conditions(args: argparse.Namespace) -> dict[str, Any]:
    return {
        "hardware": environment.hardware(),
        "versions": environment.versions(),
        **environment.provenance(),
        "max_new_tokens": args.max_new_tokens,
        "batch_size": args.batch_size,
    }


def _done(args: argparse.Namespace) -> list[dict[str, Any]]:
    """What a run under the same conditions, the command and the commit among them, has left."""
    if not args.out.exists():
        return []
    found: dict[str, Any] = json.loads(args.out.read_text(encoding="utf-8"))
    same = _conditions(args)
    return list(found["rows"]) if {k: found.get(k) for k in same} == same else []


if __name__ == "__main__":
    main()
