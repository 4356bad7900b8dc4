r"""What models say to the same prompts, side by side.

    python benchmarks/samples.py --prompts benchmarks/prompts/smoke.jsonl \
        --category math_reasoning --answer base=models/smollm2-135m-instruct:ar \
        --answer tuned=runs/dmtd-gsm8k/model:dmtd --out benchmarks/results/cpu-dmtd-samples.json

Greedy answers to a few prompts: to look at, not to count.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import mtd_jax as mtd
from mtd_jax.cli.session import choose_method
from mtd_jax.decoding.requests import read_prompts
from mtd_jax.evaluation import environment


def main() -> None:
    """Decodes greedily and writes JSON."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--prompts", type=Path, required=True)
    parser.add_argument("--category", help="of the prompts, only these")
    parser.add_argument("--answer", action="append", required=True, metavar="NAME=MODEL:METHOD")
    parser.add_argument("--max-new-tokens", type=int, default=96)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    prompts = [p for p in read_prompts(args.prompts) if args.category in (None, p.category)]
    answers: dict[str, list[str]] = {}
    for answer in args.answer:
        name, _, rest = answer.partition("=")
        path, _, method = rest.rpartition(":")
        model = mtd.load(path)
        made = choose_method(method, None, {}, method).made(model)
        found = mtd.generate(model, made, prompts, max_new_tokens=args.max_new_tokens)
        answers[name] = [completion.text for completion in found]
    rows = [
        {
            "id": prompt.id,
            "prompt": prompt.text or (prompt.messages or ({"content": ""},))[-1]["content"],
            "answers": {name: texts[i] for name, texts in answers.items()},
        }
        for i, prompt in enumerate(prompts)
    ]
    result = {
        "hardware": environment.hardware(),
        "versions": environment.versions(),
        **environment.provenance(),
        "max_new_tokens": args.max_new_tokens,
        "rows": rows,
    }
    args.out.write_text(json.dumps(result, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
