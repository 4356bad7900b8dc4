"""mtd-jax against other engines on one machine: same weights, prompts and budget of tokens.

    python benchmarks/peers.py --model models/smollm2-135m-instruct --gguf models/SmolLM2.gguf \
        --prompts benchmarks/prompts/others.jsonl --limit 12 --out results.json

Every engine runs in a process of its own and all take turns, prompt by prompt, because machines
drift within minutes: only ratios within a round are quoted. Greedy, until the end token or the
budget, all cores, the prompt's time included. An engine that is not installed is skipped by name;
`--python NAME=PATH` runs one with another interpreter (engines that do not share an environment).
What follows a colon is how an engine drafts: `transformers:prompt_lookup`, `mtd_jax:ngram`.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from mtd_jax.cli.main import main as mtd
from mtd_jax.convert.atomic import write_file
from mtd_jax.decoding.requests import read_prompts
from mtd_jax.evaluation import environment
from mtd_jax.tokenizer import Tokenizer

WORKER = Path(__file__).with_name("peer_worker.py")
OURS = "mtd_jax"
PEERS = (
    OURS,
    "mtd_jax:ngram",
    "mtd_jax:hydra:copy=true",
    "transformers",
    "transformers:prompt_lookup",
    "ctranslate2",
    "llama_cpp",
    "llama_cpp:prompt_lookup",
    "vllm",
    "vllm:ngram",
)


class EngineError(Exception):
    """An engine is not installed, or has failed; the message says why."""


class Peer:
    """One engine in its process; it answers a line of JSON to a line of JSON.

    Raises:
      EngineError: it says that it failed, or its process ended; the process is closed then.
    """

    def __init__(self, name: str, python: str, models: dict[str, Any]) -> None:
        self.name = name
        self._process = subprocess.Popen(
            [python, str(WORKER), name, json.dumps(models)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        self.hello: dict[str, Any] = self._read()

    def run(self, ids: list[int], new_tokens: int) -> dict[str, Any]:
        """Tokens and seconds of one answer."""
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps({"ids": ids, "new_tokens": new_tokens}) + "\n")
        self._process.stdin.flush()
        return self._read()

    def close(self) -> None:
        """Ends the process."""
        self._process.kill()
        self._process.wait()

    def _read(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        answer = json.loads(line) if line else {"error": "the process ended"}
        if "error" in answer:
            self.close()
            raise EngineError(answer["error"])
        return dict(answer)


def prepare(model: str, directory: Path, dtype: str, gguf: str | None) -> dict[str, Any]:
    """The model in every format that an engine wants."""
    huggingface = directory / "hf"
    if mtd(["convert", "to-hf", model, str(huggingface)]) != 0:
        raise SystemExit(2)
    ends = json.loads((huggingface / "config.json").read_text(encoding="utf-8"))["eos_token_id"]
    return {
        "native": model,
        "hf": str(huggingface),
        "ct2": str(directory / "ct2"),
        "gguf": gguf or "",
        "scratch": str(directory),
        "dtype": dtype,
        "ends": ends if isinstance(ends, list) else [ends],
    }


def main() -> None:
    """Runs the comparison and prints a table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--model", required=True, help="native checkpoint")
    parser.add_argument("--prompts", type=Path, required=True, metavar="FILE.jsonl")
    parser.add_argument("--limit", type=int, help="only the first of these prompts")
    parser.add_argument("--peers", default=",".join(PEERS))
    parser.add_argument("--python", action="append", default=[], metavar="NAME=PATH")
    parser.add_argument("--gguf", help="the model as GGUF, for llama_cpp, which dequantises it")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--max-new-tokens", type=int, default=96)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=Path, help="write JSON here")
    args = parser.parse_args()
    names = args.peers.split(",")
    if OURS not in names:
        parser.error(f"--peers needs {OURS}: ratios are to it")
    pythons = dict(pair.split("=", 1) for pair in args.python)
    prompts = _prompts(args.model, args.prompts, args.limit)
    with tempfile.TemporaryDirectory() as directory:
        models = prepare(args.model, Path(directory), args.dtype, args.gguf)
        running: list[Peer] = []
        tokens: dict[str, list[list[int]]] = {}
        skipped: dict[str, str] = {}
        for name in names:
            python = pythons.get(name.partition(":")[0], sys.executable)
            try:
                peer = Peer(name, python, models)
                # Engines compile for every length, so all prompts are answered once before.
                tokens[name] = [peer.run(ids, args.max_new_tokens)["tokens"] for ids in prompts]
            except EngineError as error:
                skipped[name] = str(error)
                print(f"left out {name}: {error}")
            else:
                running.append(peer)
        if OURS not in tokens:
            raise SystemExit(f"peers: {OURS} does not run: {skipped[OURS]}")
        rows = _measure(running, prompts, args.max_new_tokens, args.rounds, tokens)
        for peer in running:
            peer.close()
    report = {
        "prompts": len(prompts),
        "max_new_tokens": args.max_new_tokens,
        "rounds": args.rounds,
        "rows": rows,
        "hardware": environment.hardware(),
        "versions": environment.versions(),
        **environment.provenance(),
        "dtype": args.dtype,
        "skipped": skipped,
    }
    if args.out:
        write_file(args.out, json.dumps(report, indent=2) + "\n")


def _prompts(model: str, path: Path, limit: int | None) -> list[list[int]]:
    """Token ids of each prompt, by our tokenizer for all engines."""
    tokenizer = Tokenizer.load(model)
    return [tokenizer.chat(prompt.messages) for prompt in read_prompts(path)[:limit]]


def _measure(
    peers: list[Peer],
    prompts: list[list[int]],
    new_tokens: int,
    rounds: int,
    tokens: dict[str, list[list[int]]],
) -> list[dict[str, Any]]:
    seconds: dict[str, list[float]] = {p.name: [0.0] * rounds for p in peers}
    for turn in range(rounds):
        for ids in prompts:
            for peer in peers:
                seconds[peer.name][turn] += peer.run(ids, new_tokens)["seconds"]
        print(f"round {turn + 1} of {rounds}", flush=True)
    return [_row(peer, seconds, tokens) for peer in peers]


def _row(
    peer: Peer, seconds: dict[str, list[float]], tokens: dict[str, list[list[int]]]
) -> dict[str, Any]:
    """One engine beside plain decoding of ours, token for token."""
    counts = {name: sum(map(len, answers)) for name, answers in tokens.items()}
    speeds = {name: [counts[name] / s for s in took] for name, took in seconds.items()}
    ratios = [a / b for a, b in zip(speeds[peer.name], speeds[OURS], strict=True)]
    same = [a == b for a, b in zip(tokens[peer.name], tokens[OURS], strict=True)]
    row = {
        "peer": peer.name,
        "version": peer.hello["version"],
        "tokens_per_second": [round(s, 2) for s in speeds[peer.name]],
        "median": round(statistics.median(speeds[peer.name]), 2),
        "over_mtd_jax": round(statistics.median(ratios), 3),
        "over_mtd_jax_range": [round(min(ratios), 3), round(max(ratios), 3)],
        "new_tokens": counts[peer.name],
        "identical_prompts": sum(same),
    }
    print(
        f"{peer.name:28} {peer.hello['version']:14} {row['median']:8.1f} tokens/s   "
        f"{row['over_mtd_jax']:.2f}x {OURS}   same tokens on {sum(same)} of {len(same)} prompts"
    )
    return row


if __name__ == "__main__":
    main()
