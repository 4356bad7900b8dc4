"""mtd-jax against other engines on one machine: same weights, same prompt, same number of tokens.

    python benchmarks/peers.py --model models/smollm2-135m-instruct --out results.json

Every engine runs in a process of its own and all take turns, because machines drift within minutes:
only ratios within a round are quoted. Greedy, end tokens ignored, all cores, prompt included in the
time. An engine that is not installed is skipped by name; `--python NAME=PATH` runs one with another
interpreter (for engines that do not share an environment).
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

WORKER = Path(__file__).with_name("peer_worker.py")
PEERS = ("mtd_jax", "transformers", "ctranslate2", "llama_cpp")
PROMPT = (
    "Write a short story about a lighthouse keeper who finds a message in a bottle. The message "
    "was sent by someone who lived a hundred years ago and asks for help."
)


class Peer:
    """One engine in its process; it answers a line of JSON to a line of JSON."""

    def __init__(self, name: str, python: str, models: dict[str, str]) -> None:
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


def prepare(model: str, directory: Path, dtype: str, gguf: str | None) -> dict[str, str]:
    """The model in every format that an engine wants."""
    huggingface = directory / "hf"
    if mtd(["convert", "to-hf", model, str(huggingface)]) != 0:
        raise SystemExit(2)
    return {
        "native": model,
        "hf": str(huggingface),
        "ct2": str(directory / "ct2"),
        "gguf": gguf or "",
        "dtype": dtype,
    }


def main() -> None:
    """Runs the comparison and prints a table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--model", required=True, help="native checkpoint")
    parser.add_argument("--peers", default=",".join(PEERS))
    parser.add_argument("--python", action="append", default=[], metavar="NAME=PATH")
    parser.add_argument("--gguf", help="the same weights as GGUF, for llama_cpp")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--new-tokens", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--out", help="write JSON here")
    args = parser.parse_args()
    pythons = dict(pair.split("=", 1) for pair in args.python)
    with tempfile.TemporaryDirectory() as directory:
        models = prepare(args.model, Path(directory), args.dtype, args.gguf)
        running: list[Peer] = []
        skipped: dict[str, str] = {}
        for name in args.peers.split(","):
            peer = Peer(name, pythons.get(name, sys.executable), models)
            if "error" in peer.hello:
                skipped[name] = peer.hello["error"]
                print(f"skipped {name}: {skipped[name]}")
                peer.close()
            else:
                running.append(peer)
        ids = _prompt_ids(args.model)
        report = _measure(running, ids, args.new_tokens, args.rounds)
        for peer in running:
            peer.close()
    report |= {
        "hardware": environment.hardware(),
        "versions": environment.versions(),
        **environment.provenance(),
        "dtype": args.dtype,
        "skipped": skipped,
    }
    if args.out:
        Path(args.out).write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")


def _prompt_ids(model: str) -> list[int]:
    from mtd_jax.tokenizer import Tokenizer

    return Tokenizer.load(model).chat([{"role": "user", "content": PROMPT}])


def _measure(peers: list[Peer], ids: list[int], new_tokens: int, rounds: int) -> dict[str, Any]:
    speeds: dict[str, list[float]] = {p.name: [] for p in peers}
    tokens: dict[str, list[int]] = {}
    for peer in peers:
        tokens[peer.name] = peer.run(ids, new_tokens)["tokens"]  # warm-up
    for _ in range(rounds):
        for peer in peers:
            answer = peer.run(ids, new_tokens)
            speeds[peer.name].append(len(answer["tokens"]) / answer["seconds"])
    ours = speeds["mtd_jax"]
    rows = []
    for peer in peers:
        ratios = [a / b for a, b in zip(ours, speeds[peer.name], strict=True)]
        same = next(
            (
                i
                for i, (a, b) in enumerate(zip(tokens["mtd_jax"], tokens[peer.name], strict=False))
                if a != b
            ),
            None,
        )
        rows.append(
            {
                "peer": peer.name,
                "version": peer.hello["version"],
                "tokens_per_second": [round(s, 2) for s in speeds[peer.name]],
                "median": round(statistics.median(speeds[peer.name]), 2),
                "mtd_jax_over_peer": round(statistics.median(ratios), 3),
                "first_different_token": same,
            }
        )
        print(
            f"{peer.name:14} {peer.hello['version']:12} {rows[-1]['median']:8.1f} tokens/s   "
            f"mtd_jax is {rows[-1]['mtd_jax_over_peer']:.2f}x   "
            f"tokens {'identical' if same is None else f'differ from {same}'}"
        )
    return {"prompt_tokens": len(ids), "new_tokens": new_tokens, "rounds": rounds, "rows": rows}


if __name__ == "__main__":
    main()
