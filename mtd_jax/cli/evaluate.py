"""`mtd eval`: what a method costs in quality, on texts and tasks."""

from __future__ import annotations

import argparse
import json
import warnings
from typing import Any

from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from mtd_jax.cli import arguments
from mtd_jax.cli.session import (
    Choice,
    cache_directory,
    choose_method,
    open_method,
    open_model,
)
from mtd_jax.decoding.language_model import LanguageModel
from mtd_jax.errors import InputError
from mtd_jax.evaluation.text_loss import TextLoss, text_loss, text_rows
from mtd_jax.training.config import DataConfig

_DESCRIPTION = """\
Measure how well a model says texts: loss in nats a token, perplexity, and how often the next token
was the likeliest. With --baseline, what is kept of another model's quality beside it.

  mtd eval --model runs/dmtd/model --method dmtd --text held_out.jsonl \\
           --baseline runs/sft/model

Texts are .jsonl files of {"messages": [...]} or {"text": ...}, .txt files, or directories of such.
Of conversations what the assistant says counts (--loss all: everything). A method with cycles is
measured in its cycles, and the loss of every place in a cycle is given. Lossless methods have the
loss of the model itself.
"""


def add_parser(commands: arguments.Subparsers) -> None:
    """Declares the command."""
    parser = commands.add_parser(
        "eval",
        help="measure quality: loss, perplexity, what a method keeps",
        description=_DESCRIPTION,
    )
    arguments.add_model_arguments(parser)
    arguments.add_method_arguments(parser)
    parser.add_argument("--text", metavar="PATH", action="append", help="texts; may be repeated")
    parser.add_argument("--baseline", metavar="PATH", help="model to compare with, decoded plainly")
    parser.add_argument(
        "--length", type=int, default=1024, metavar="N", help="tokens of a row (default: 1024)"
    )
    parser.add_argument("--batch-size", type=int, default=1, metavar="B", help="rows (default: 1)")
    parser.add_argument(
        "--loss",
        choices=("assistant", "all"),
        default="assistant",
        help="what counts in conversations (default: assistant)",
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Runs the command."""
    for name in ("batch_size", "length"):
        if getattr(args, name) < 1:
            raise InputError(f"--{name.replace('_', '-')} must be at least 1")
    if not args.text:
        raise InputError("give texts to measure on: --text PATH")
    data = DataConfig(train=tuple(args.text), length=args.length, loss=args.loss)
    report: dict[str, Any] = {"model": args.model, "method": args.method, "text": args.text}
    found = _measured(args, open_method(args), data)
    report |= found.to_dict()
    if args.baseline is not None:
        args.model = args.baseline
        base = _measured(args, choose_method("ar", None, {}, "ar"), data)
        report["baseline"] = {"model": args.baseline, **base.to_dict()}
        report["retention"] = {
            "accuracy": found.accuracy / base.accuracy if base.accuracy else None,
            "perplexity": base.perplexity / found.perplexity,
        }
    if args.json:
        print(json.dumps(report))
    else:
        _show(report)
    return 0


def _measured(args: argparse.Namespace, choice: Choice, data: DataConfig) -> TextLoss:
    model: LanguageModel = open_model(args)
    method = choice.made(model)
    notice = method.check(model.config, frozenset())
    if notice is not None:
        warnings.warn(notice, UserWarning, stacklevel=2)
    rows = text_rows(model, data, cache_directory() / "tokens")
    console = Console(stderr=True)
    with Progress(console=console, transient=True, disable=args.json) as bar:
        task = bar.add_task(f"{args.model}", total=-(-len(rows) // args.batch_size))
        return text_loss(
            model, method, rows, batch_size=args.batch_size, progress=lambda: bar.advance(task)
        )


def _show(report: dict[str, Any]) -> None:
    table = Table()
    for column in ("model", "method", "tokens", "loss", "perplexity", "accuracy"):
        table.add_column(column, justify="left" if column in ("model", "method") else "right")
    rows = [report] + ([{"method": "ar", **report["baseline"]}] if "baseline" in report else [])
    for row in rows:
        numbers = f"{row['loss']:.4f}", f"{row['perplexity']:.3f}", f"{row['accuracy']:.4f}"
        table.add_row(row["model"], row["method"], f"{row['tokens']:,}", *numbers)
    console = Console(highlight=False)
    console.print(table)
    if report["by_place"]:
        text = ", ".join(f"{place}: {loss:.4f}" for place, loss in report["by_place"].items())
        console.print(f"loss by place in the cycle: {text}", markup=False, soft_wrap=True)
    if "retention" in report:
        kept = report["retention"]
        share = "-" if kept["accuracy"] is None else f"{kept['accuracy']:.1%}"
        console.print(
            f"kept of the baseline: accuracy {share}, perplexity {kept['perplexity']:.1%}",
            markup=False,
        )
