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


class Peer:
    """One engine in its process; it answers a line of JSON to a line of JSON."""

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
        return json.loads(line) if line else {"error": "the process ended"}


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
        skipped: dict[str, str] = {}
        for name in names:
            python = pythons.get(name.partition(":")[0], sys.executable)
            peer = Peer(name, python, models)
            if "error" in peer.hello:
                skipped[name] = peer.hello["error"]
                print(f"skipped {name}: {skipped[name]}")
                peer.close()
            else:
                running.append(peer)
        tokens = _warmed(running, prompts, args.max_new_tokens, skipped)
        running = [peer for peer in running if peer.name in tokens]
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
        args.out.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")


def _prompts(model: str, path: Path, limit: int | None) -> list[list[int]]:
    """Token ids of each prompt, by our tokenizer for all engines."""
    tokenizer = Tokenizer.load(model)
    lines = path.read_text(encoding="utf-8").splitlines()[:limit]
    return [tokenizer.chat(json.loads(line)["messages"]) for line in lines]


def _warmed(
    peers: list[Peer], prompts: list[list[int]], new_tokens: int, skipped: dict[str, str]
) -> dict[str, list[list[int]]]:
    """What each engine answers, run once because engines compile for every length.

    One that fails is closed, and why is added to `skipped`.
    """
    tokens: dict[str, list[list[int]]] = {}
    for peer in peers:
        answers = []
        for ids in prompts:
            answer = peer.run(ids, new_tokens)
            if "error" in answer:
                skipped[peer.name] = answer["error"]
                print(f"left out {peer.name}: {answer['error']}")
                peer.close()
                break
            answers.append(answer["tokens"])
        else:
            tokens[peer.name] = answers
    return tokens


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
