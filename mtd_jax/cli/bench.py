"""`mtd bench`: how fast methods decode."""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table

from mtd_jax import methods
from mtd_jax.cli import arguments
from mtd_jax.cli.session import open_model, sampling_of
from mtd_jax.decoding.requests import read_prompts
from mtd_jax.errors import InputError
from mtd_jax.evaluation import environment
from mtd_jax.evaluation.bench import BenchResult, bench, to_json

_DESCRIPTION = """\
Measure decoding speed on your own model and prompts.

  mtd bench --model models/smollm2 --prompts prompts.jsonl --batch-sizes 1,4 --out results.json

Methods are run in turns, so that all meet the same machine. The roofline share says how close a
speed comes to reading the weights from memory once a step, which no one-token decoder can beat.
"""
_DEFAULT_NEW_TOKENS = 128


def add_parser(commands: arguments.Subparsers) -> None:
    """Declares the command."""
    parser = commands.add_parser("bench", help="measure decoding speed", description=_DESCRIPTION)
    arguments.add_model_arguments(parser)
    parser.add_argument("--methods", default="ar", metavar="M,M,...", help="default: ar")
    parser.add_argument("--prompts", required=True, metavar="FILE.jsonl", help="what to decode")
    parser.add_argument("--limit", type=int, metavar="N", help="only the first N prompts")
    parser.add_argument("--batch-sizes", default="1", metavar="B,B,...", help="default: 1")
    parser.add_argument("--repeats", type=int, default=3, metavar="N", help="default: 3")
    parser.add_argument(
        "--ignore-eos", action="store_true", help="decode the whole budget for every prompt"
    )
    arguments.add_sampling_arguments(parser)
    parser.add_argument("--out", metavar="FILE.json", help="write the result here too")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Runs the command."""
    if args.stop:
        raise InputError("bench does not take --stop")
    for name in ("repeats", "limit"):
        value = getattr(args, name)
        if value is not None and value < 1:
            raise InputError(f"--{name} must be at least 1, got {value}")
    if args.out is not None and (Path(args.out).is_dir() or not Path(args.out).parent.is_dir()):
        raise InputError(f"cannot write {args.out}: it is a directory, or is in none")
    sampling = sampling_of(args)
    chosen = [methods.make_method(name, {}) for name in args.methods.split(",")]
    sizes = [_positive(text) for text in args.batch_sizes.split(",")]
    _check_distinct("methods", [method.name for method in chosen])
    _check_distinct("batch-sizes", sizes)
    prompts = read_prompts(args.prompts)[: args.limit]
    model = open_model(args)
    console = Console(stderr=True)
    with console.status("measuring memory bandwidth") as status:
        result = bench(
            model,
            chosen,
            prompts,
            batch_sizes=sizes,
            max_new_tokens=args.max_new_tokens
            if args.max_new_tokens is not None
            else _DEFAULT_NEW_TOKENS,
            sampling=sampling,
            ignore_eos=args.ignore_eos,
            repeats=args.repeats,
            progress=status.update,
        )
    report = {
        "hardware": environment.hardware(),
        "versions": environment.versions(),
        **environment.provenance(),
        "model": {"path": args.model, "source": model.source, "fingerprint": model.fingerprint},
        "dtype": str(model.params.embedding.dtype),
        "prompts": len(prompts),
        **to_json(result),
    }
    if args.out is not None:
        _write(Path(args.out), report)
    if args.json:
        print(json.dumps(report))
    else:
        _show(result)
    return 0


def _positive(text: str) -> int:
    if not text.strip().isdecimal() or len(text) > 6 or int(text) < 1:
        raise InputError(f"--batch-sizes takes whole numbers of at least 1, got '{text[:20]}'")
    return int(text)


def _check_distinct(flag: str, values: Sequence[object]) -> None:
    for value in values:
        if values.count(value) > 1:
            raise InputError(f"--{flag} names {value} twice")


def _write(path: Path, report: dict[str, object]) -> None:
    """Writes beside the file and renames, so that a killed run leaves the old one."""
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        partial.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
        partial.replace(path)
    except OSError as error:
        raise InputError(f"cannot write {path}: {error.strerror}") from None


def _show(result: BenchResult) -> None:
    table = Table(title=f"memory bandwidth {result.bandwidth / 1e9:.1f} GB/s")
    for column in ("method", "batch", "tokens/s", "decode tokens/s", "spread", "vs ar"):
        table.add_column(column, justify="left" if column == "method" else "right")
    for column in ("roofline", "same as ar", "compile s"):
        table.add_column(column, justify="right")
    for row in result.rows:
        table.add_row(
            row.method,
            str(row.batch_size),
            f"{row.tokens_per_second:.1f}",
            f"{row.decode_tokens_per_second:.1f}",
            f"{row.spread:.0%}",
            "-" if row.speedup_vs_ar is None else f"{row.speedup_vs_ar:.2f}x",
            f"{row.roofline_share:.0%}",
            "-" if row.identical_to_ar is None else "yes" if row.identical_to_ar else "NO",
            f"{row.compile_seconds:.1f}",
        )
    Console().print(table)
