"""What reading a batch of prompts one by one saves over reading them side by side, on a CPU.

    taskset -c 0 python benchmarks/prompt_reading.py --model models/smollm2-135m-instruct \
        --prompts corpus/prompts.jsonl --out benchmarks/results/cpu-prompt-reading.json

Seconds are the processor's, not the clock's, so that others who use the machine count little; both
ways take turns, and only ratios within a round are quoted. Compilation is not among them.
"""

from __future__ import annotations

import argparse
import functools
import json
import shlex
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import mtd_jax as mtd
from mtd_jax import backend
from mtd_jax.decoding.prompt import bucket_prompt, read_prompt
from mtd_jax.decoding.requests import prompt_token_ids, read_prompts
from mtd_jax.evaluation import environment

WAYS = {"side by side": False, "one by one": True}


def compiled(alone: bool, *arguments: Any, capacity: int) -> Any:
    """`read_prompt` compiled for reading in one of the ways; it is chosen while tracing."""
    before = backend.reads_prompts_alone
    backend.reads_prompts_alone = lambda: alone
    try:
        return (
            jax.jit(functools.partial(read_prompt, capacity=capacity)).lower(*arguments).compile()
        )
    finally:
        backend.reads_prompts_alone = before


def main() -> None:
    """Reads the first prompts of a file in turns and writes the ratios."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--model", required=True)
    parser.add_argument("--prompts", required=True)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    model = mtd.load(args.model)
    prompts = read_prompts(args.prompts)[: args.batch]
    rows = [prompt_token_ids(prompt, model.tokenizer, None) for prompt in prompts]
    lengths = [len(ids) for ids in rows]
    tokens = np.zeros((len(rows), bucket_prompt(max(lengths))), np.int32)
    for row, ids in zip(tokens, rows, strict=True):
        row[: len(ids)] = ids
    given = (model.params, jnp.asarray(tokens), jnp.asarray(lengths, jnp.int32))
    programs = {way: compiled(a, *given, capacity=tokens.shape[1]) for way, a in WAYS.items()}
    seconds: dict[str, list[float]] = {way: [] for way in WAYS}
    for _ in range(args.rounds):
        for way, program in programs.items():
            began = time.process_time()
            jax.block_until_ready(program(*given))
            seconds[way].append(round(time.process_time() - began, 3))
    slow, fast = (seconds[way] for way in WAYS)
    result = {
        "command": shlex.join(["python", "benchmarks/prompt_reading.py", *sys.argv[1:]]),
        "versions": environment.versions(),
        **environment.provenance(),
        "lengths": sorted(lengths),
        "padded": tokens.shape[1],
        "processor_seconds": seconds,
        "ratio": round(statistics.median(a / b for a, b in zip(slow, fast, strict=True)), 2),
    }
    args.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(f"{result['ratio']:.2f} times less processor time one by one")


if __name__ == "__main__":
    main()
