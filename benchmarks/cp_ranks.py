r"""CP heads from random weights by rank: what a mixture gains over independent heads (rank 1).

    python -m train.corpus --out corpus --downloads downloads
    grep '"python_stdlib"' corpus/train.jsonl > texts.jsonl
    python -m benchmarks.cp_ranks configs/cp/scratch-byte.toml --shape configs/models/byte-1m.toml \
        --set data.train='["texts.jsonl"]' --work runs/cp-ranks \
        --out benchmarks/results/cpu-cp-ranks.json --plot docs/cp-ranks-cpu.png

For each seed all ranks begin with the same trunk and see the same rows in the same order. Texts
are drawn from the model itself (temperature 1, drafts tested by min(1, p / q)): greedy ones of so
small a model run in circles, and how long drafts are accepted is then the circle's doing. Speeds
are those of drafting with the heads over decoding the same weights without drafts, in turns.
Interrupted, the same command goes on; what is trained already is measured again.

With a `--work` and an `--out` of their own: what balancing does to one rank (`--ranks 4 --balances
0,0.001,0.1`); and what becomes of models that are trained already, with their heads or below them
(`--base 'runs/byte-{seed}/model' --trunks frozen,trained`).
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
from pathlib import Path
from typing import Any

import mtd_jax as mtd
from benchmarks.shapes import numbers, whole_numbers
from mtd_jax import Prompt, methods
from mtd_jax.cli.page import make_parser, run
from mtd_jax.cli.session import use_compilation_cache
from mtd_jax.cli.train import fit_and_write, prepare_run, result_of
from mtd_jax.config import read_shape
from mtd_jax.convert.atomic import write_file
from mtd_jax.convert.method_files import FILE
from mtd_jax.evaluation import environment, plot
from mtd_jax.evaluation.bench import bench
from mtd_jax.parameters import count
from mtd_jax.training.config import read_config
from mtd_jax.training.log import read_log
from mtd_jax.training.rows import Rows
from train.fresh import write_fresh

PROMPTS = 32
PROMPT_BYTES = 64


def main() -> None:
    """Trains, measures, writes and draws."""
    parser = make_parser(__doc__)
    parser.add_argument("config", help="of `mtd train`, for cp")
    begun = parser.add_mutually_exclusive_group(required=True)
    begun.add_argument("--shape", type=Path, help="of models with random weights")
    begun.add_argument("--base", help="models of `mtd train`; {seed} in it stands for the seed")
    parser.add_argument("--ranks", type=whole_numbers, default=[1, 2, 4, 8])
    parser.add_argument("--seeds", type=whole_numbers, default=[0, 1, 2])
    parser.add_argument(
        "--balances", type=numbers, default=[None], help="weights of balancing; else the config's"
    )
    parser.add_argument(
        "--trunks", type=lambda text: text.split(","), default=[None], help="frozen,trained"
    )
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE")
    parser.add_argument("--new-tokens", type=int, default=128)
    parser.add_argument("--work", type=Path, required=True, help="directory of the runs")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--plot", type=Path)
    args = parser.parse_args()
    use_compilation_cache()
    rows: list[dict[str, Any]] = []
    variations = itertools.product(args.balances, args.trunks, args.seeds, args.ranks)
    for balance, trunk, seed, rank in variations:
        options = {"rank": rank, "balance": balance, "trunk": trunk}
        rows.append(_row(args, seed, {k: v for k, v in options.items() if v is not None}))
        print(json.dumps(rows[-1]), flush=True)
        result = {
            "hardware": environment.hardware(),
            "versions": environment.versions(),
            **environment.provenance(),
            "rows": rows,
        }
        write_file(args.out, json.dumps(result, indent=1) + "\n")
    if args.plot is not None:
        plot.plot_ranks(rows, args.plot)


def _row(args: argparse.Namespace, seed: int, options: dict[str, Any]) -> dict[str, Any]:
    base = _base(args, seed)
    name = "-".join(f"{key}-{value}" for key, value in ({"seed": seed} | options).items())
    own = [f'model="{base}"', f'out="{args.work / name}"', f"seed={seed}"]
    own += [f"options.{key}={json.dumps(value)}" for key, value in options.items()]
    prepared = prepare_run(read_config(args.config, [*args.set, *own]))
    if not (result_of(prepared) / FILE).is_file() and not fit_and_write(prepared).finished:
        sys.exit(0)  # it was asked to stop, and has saved what there is
    log = read_log(prepared.directory)
    last = _last(log)
    known = prepared.config.options
    names = ["joint", *(f"conditional_{s + 1}" for s in range(known["tokens"]))]
    assert prepared.held_out is not None
    model = prepared.directory / "model" if known["trunk"] == "trained" else base
    return {
        "rank": known["rank"],
        "seed": seed,
        "balance": known["balance"],
        "trunk": known["trunk"],
        "base_loss": None if args.base is None else _last(read_log(base.parent))["held_out_loss"],
        "steps": int(last["step"]),
        "tokens": int(sum(line.get("tokens", 0) for line in log)),
        **{name: round(last[f"held_out_{name}"], 5) for name in (*names, "usage_entropy")},
        **_decoded(model, prepared.directory / "heads", prepared.held_out, args.new_tokens),
    }


def _last(log: list[dict[str, Any]]) -> dict[str, Any]:
    """The last evaluation."""
    return [line for line in log if "held_out_loss" in line][-1]


def _base(args: argparse.Namespace, seed: int) -> Path:
    """The model that training begins with."""
    if args.base is not None:
        return Path(args.base.format(seed=seed))
    base: Path = args.work / f"base-{seed}"
    if not base.exists():
        write_fresh(read_shape(args.shape), base, seed)
    return base


def _decoded(model_at: Path, heads_at: Path, texts: Rows, new_tokens: int) -> dict[str, Any]:
    """Acceptance and speed behind pieces of held-out texts; greedy, whether tokens are the same."""
    model = mtd.load(model_at)
    heads = mtd.load_heads(heads_at, model)
    prompts = _prompts(texts)

    def rows(drafting: Any, **options: Any) -> Any:
        made = {"ar": lambda _: methods.cp(heads, tree="none"), "cp": lambda _: drafting}
        options = {"max_new_tokens": new_tokens, "ignore_eos": True} | options
        return bench(model, made, prompts, **options).rows

    testing = methods.cp(heads, tree="chain", acceptance="rejection")
    plain, drawn = rows(testing, sampling=mtd.Sampling(temperature=1.0))
    greedy = rows(methods.cp(heads, tree="chain"), repeats=1)[1]
    measured = drawn.metrics.to_dict()
    return {
        "parameters": {"model": count(model.params), "heads": count(heads.weights)},
        "plain_tokens_per_second": round(plain.decode_tokens_per_second, 1),
        "tokens_per_second": round(drawn.decode_tokens_per_second, 1),
        "mean_acceptance_length": measured["mean_acceptance_length"],
        "per_position_acceptance": measured["per_position_acceptance"],
        "tokens_per_forward": measured["tokens_per_forward"],
        "speedup": round(drawn.speedup_vs_ar or 0.0, 4),
        "greedy_identical": greedy.identical_to_ar,
        "greedy_mean_acceptance_length": greedy.metrics.to_dict()["mean_acceptance_length"],
    }


def _prompts(texts: Rows) -> list[Prompt]:
    """The beginnings of some rows, over all of the texts."""
    chosen = range(0, len(texts), max(1, len(texts) // PROMPTS))[:PROMPTS]
    pieces = {i: texts[i].tokens[:PROMPT_BYTES].tolist() for i in chosen}
    # Seeds of their own: with one, all texts would draw with the same noise.
    return [Prompt(str(i), token_ids=tuple(piece), seed=i) for i, piece in pieces.items()]


if __name__ == "__main__":
    run(main, "cp_ranks.py")
