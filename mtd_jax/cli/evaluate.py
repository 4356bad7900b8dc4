"""`mtd eval`: what a method costs in quality, on texts and tasks."""

from __future__ import annotations

import argparse
import json
import math
from typing import Any

from rich.console import Console
from rich.table import Table

from mtd_jax.cli import arguments
from mtd_jax.cli.arguments import existing_path
from mtd_jax.cli.session import (
    Choice,
    choose_method,
    open_method,
    open_model,
)
from mtd_jax.decoding.method import Method, check
from mtd_jax.directories import cache_directory
from mtd_jax.errors import InputError
from mtd_jax.evaluation.harness import run_tasks
from mtd_jax.evaluation.text_loss import text_loss, text_rows
from mtd_jax.progress import progress
from mtd_jax.training.config import DataConfig

_DESCRIPTION = """\
Measure how well a model says texts: loss in nats a token, perplexity, and how often the next token
was the likeliest. With --baseline, what is kept of another model's quality beside it.

  mtd eval --model runs/dmtd/model --method dmtd --text held_out.jsonl \\
           --baseline runs/sft/model

Texts are .jsonl files of {"messages": [...]} or {"text": ...}, .txt files, or directories of such.
--tasks runs tasks of lm-eval (pip install 'mtd-jax[eval]') beside or in place of texts: their
names, or those of YAML files in --include. Their data must be on disk or within reach.

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
    parser.add_argument("--tasks", metavar="NAME,...", help="tasks of lm-eval")
    parser.add_argument("--include", metavar="DIR", help="directory with tasks of your own")
    parser.add_argument("--limit", type=int, metavar="N", help="documents of each task")
    parser.add_argument("--few-shot", type=int, metavar="N", help="examples in front of each")
    parser.add_argument("--chat", action="store_true", help="tasks in the chat template")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Runs the command."""
    arguments.check_positive(args, "batch_size", "length", "limit")
    if args.few_shot is not None and args.few_shot < 0:
        raise InputError("--few-shot must be at least 0")
    if not args.text and not args.tasks:
        raise InputError("give texts to measure on (--text PATH), or tasks (--tasks NAME)")
    report: dict[str, Any] = {"model": args.model, "method": args.method, "text": args.text}
    if args.baseline is not None:
        existing_path(args.baseline, "model")
    method, found = _measured(args, args.model, open_method(args))
    report |= found
    if args.baseline is not None:
        plain = choose_method("ar", None, {}, "ar")
        _, base = _measured(args, args.baseline, plain, places_of=method)
        report["baseline"] = {"model": args.baseline, **base}
        report["retention"] = _retention(report, base)
    if args.json:
        print(json.dumps(report))
    else:
        _show(report)
    return 0


def _measured(
    args: argparse.Namespace, path: str, choice: Choice, places_of: Method | None = None
) -> tuple[Method, dict[str, Any]]:
    """The method; losses on texts and metrics of tasks, JSON-ready."""
    model = open_model(args, path)
    method = choice.made(model)
    check(method, model.config)
    found: dict[str, Any] = {}
    if args.text:
        data = DataConfig(train=tuple(args.text), length=args.length, loss=args.loss)
        rows = text_rows(model, data, cache_directory() / "tokens")
        with progress(f"reading texts, {path}", -(-len(rows) // args.batch_size)) as shown:
            losses = text_loss(
                model,
                method,
                rows,
                batch_size=args.batch_size,
                places_of=places_of,
                progress=shown.advance,
            )
        found |= losses.to_dict()
    if args.tasks:
        with progress(f"answering tasks, {path}", None) as shown:
            found["tasks"] = run_tasks(
                model,
                method,
                args.tasks.split(","),
                include=args.include,
                limit=args.limit,
                few_shot=args.few_shot,
                chat=args.chat,
                batch_size=args.batch_size,
                progress=shown.update,
            )
    return method, found


def _retention(found: dict[str, Any], base: dict[str, Any]) -> dict[str, Any]:
    """Share of the baseline's figures that is kept."""
    kept: dict[str, Any] = {}
    if "loss" in found:
        kept["accuracy"] = found["accuracy"] / base["accuracy"] if base["accuracy"] else None
        kept["perplexity"] = base["perplexity"] / found["perplexity"]
        kept["perplexity_by_place"] = {
            place: math.exp(base["by_place"][place] - loss)
            for place, loss in found["by_place"].items()
            if place in base["by_place"]
        }
    if "tasks" in found:
        kept["tasks"] = {
            task: {
                name: value / base["tasks"][task][name]
                for name, value in metrics.items()
                if base["tasks"][task].get(name)
            }
            for task, metrics in found["tasks"].items()
        }
    return kept


def _show(report: dict[str, Any]) -> None:
    console = Console(highlight=False, markup=False)
    models = [report] + ([{"method": "ar", **report["baseline"]}] if "baseline" in report else [])
    kept = report.get("retention", {})
    if "loss" in report:
        table = Table()
        for column in ("model", "method", "tokens", "loss", "perplexity", "accuracy"):
            table.add_column(column, justify="left" if column in ("model", "method") else "right")
        for row in models:
            numbers = f"{row['loss']:.4f}", f"{row['perplexity']:.3f}", f"{row['accuracy']:.4f}"
            table.add_row(row["model"], row["method"], f"{row['tokens']:,}", *numbers)
        console.print(table)
        if report["by_place"]:
            text = ", ".join(f"{place}: {loss:.4f}" for place, loss in report["by_place"].items())
            console.print(f"loss by place in the cycle: {text}", soft_wrap=True)
        if kept:
            share = "-" if kept["accuracy"] is None else f"{kept['accuracy']:.1%}"
            console.print(
                f"kept of the baseline: accuracy {share}, perplexity {kept['perplexity']:.1%}"
            )
            places = kept["perplexity_by_place"].items()
            text = ", ".join(f"{place}: {value:.1%}" for place, value in places)
            if text:
                console.print(f"perplexity kept by place: {text}", soft_wrap=True)
    if "tasks" in report:
        table = Table(
            "task", "metric", *(row["model"] for row in models), *(["kept"] if kept else [])
        )
        for task, metrics in report["tasks"].items():
            for name in metrics:
                cells = [f"{row['tasks'][task].get(name, float('nan')):.4f}" for row in models]
                share = kept.get("tasks", {}).get(task, {}).get(name)
                cells += ["-" if share is None else f"{share:.1%}"] if kept else []
                table.add_row(task, name, *cells)
        console.print(table)
