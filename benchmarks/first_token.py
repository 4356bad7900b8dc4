"""From starting `mtd generate` to its first text, with programs already in the compilation cache.

python benchmarks/first_token.py --model models/smollm2-135m-instruct --out results.json
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path

from mtd_jax.evaluation import environment

PROMPT = "Why is the sky blue?"


def seconds_to_first_text(model: str) -> float:
    """Wall time of one process: Python, imports, loading, tracing, the prompt."""
    command = [sys.executable, "-m", "mtd_jax.cli", "generate", "--model", model]
    began = time.perf_counter()
    process = subprocess.Popen(
        [*command, "--prompt", PROMPT, "--stream", "--max-new-tokens", "4"],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
    )
    assert process.stdout is not None
    first = process.stdout.read(1)
    seconds = time.perf_counter() - began
    process.communicate()
    if not first:
        raise SystemExit("mtd generate printed nothing")
    return seconds


def main() -> None:
    """Measures a few runs after one that fills the cache."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--model", required=True)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    first = seconds_to_first_text(args.model)
    warm = [seconds_to_first_text(args.model) for _ in range(args.runs)]
    report = {
        "hardware": environment.hardware(),
        "versions": environment.versions(),
        **environment.provenance(),
        # A tokenizer without tokenizer.json makes transformers import torch wherever it finds it.
        "torch_installed": importlib.util.find_spec("torch") is not None,
        "first_run": round(first, 2),
        "seconds": [round(s, 2) for s in warm],
        "median": round(statistics.median(warm), 2),
    }
    print(json.dumps(report, indent=2))
    if args.out is not None:
        args.out.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
