"""`mtd inspect`: what a checkpoint is."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from mtd_jax.cli.arguments import Subparsers
from mtd_jax.decoding.draft_vocabulary import VOCABULARY

_DESCRIPTION = """\
Says what a native checkpoint, a Hugging Face directory, a GGUF file or a directory of heads holds,
without loading its weights.

example:
  mtd inspect models/smollm2-135m-instruct
"""


def add_parser(subparsers: Subparsers) -> None:
    """Adds `inspect`."""
    parser = subparsers.add_parser(
        "inspect",
        help="say what a checkpoint is",
        description=_DESCRIPTION,
    )
    parser.add_argument("path", metavar="PATH", type=Path, help="directory or GGUF file")
    parser.add_argument("--json", action="store_true", help="one JSON object on stdout")
    parser.add_argument(
        "--fingerprint",
        action="store_true",
        help="read all weights to compute it (a native checkpoint carries it)",
    )
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Prints a table or one JSON object."""
    from mtd_jax.convert.summary import summarize

    summary = summarize(args.path, with_fingerprint=args.fingerprint)
    if args.json:
        print(json.dumps(summary))
    elif summary["format"] == "heads":
        _print_heads(summary)
    else:
        _print_table(summary)
    return 0


def _print_heads(summary: dict[str, Any]) -> None:
    """A method's settings and weights."""
    record = dict(summary["record"])
    rows = {
        "method": summary["method"],
        "options": json.dumps(summary["options"]),
        "base": summary["base"],
        "parameters": f"{summary['parameters']:,}",
        "stored as": summary["dtype"] or "settings alone",
    }
    for place, shares in enumerate(record.pop("accuracies", None) or (), start=1):
        rows[f"right, place {place}"] = ", ".join(f"{share:.3f}" for share in shares)
    if VOCABULARY in record:
        rows["drafts"] = f"the {len(record.pop(VOCABULARY)):,} most frequent tokens"
    rows |= {name: json.dumps(value) for name, value in record.items()}
    _print(summary, rows)


def _print_table(summary: dict[str, Any]) -> None:
    model = summary["model"]
    rope = model["rope"]
    heads = (
        f"{model['num_heads']} query, {model['num_kv_heads']} key/value, {model['head_dim']} wide"
    )
    windows = {w for w in model["sliding_windows"] or [] if w is not None}
    rows = {
        "format": summary["format"],
        "family": model["family"],
        "parameters": f"{summary['parameters']:,}",
        "stored as": f"{summary['dtype']}, {summary['bytes'] / 1e6:,.1f} MB",
        "layers": str(model["num_layers"]),
        "width": f"{model['hidden_size']}, MLP {model['intermediate_size']}",
        "heads": heads,
        "vocabulary": f"{model['vocab_size']}{', tied' if model['tie_embeddings'] else ''}",
        "context": str(summary["context"]),
        "sliding window": ", ".join(map(str, sorted(windows))) or "none",
        "rope": f"{rope['kind']}, theta {rope['theta']:g}",
        "tokenizer": "yes" if summary["tokenizer"] else "no",
        "source": summary["source"],
        "fingerprint": summary["fingerprint"] or "not computed (--fingerprint)",
    }
    if model["cycles"] is not None:
        rows["cycles (dmtd)"] = ", ".join(f"{k} {v}" for k, v in model["cycles"].items())
    if summary["method"] is not None:
        rows["method"] = json.dumps(summary["method"])
    _print(summary, rows)


def _print(summary: dict[str, Any], rows: dict[str, str]) -> None:
    """What is said of the whole, and below it every weight."""
    from rich.console import Console
    from rich.table import Table

    table = Table(title=str(summary["path"]), show_header=False)
    for name, value in rows.items():
        table.add_row(name, value)
    weights = Table("weight", "shape")
    for name, shape in summary["shapes"].items():
        weights.add_row(name, " x ".join(map(str, shape)))
    console = Console(markup=False, highlight=False)  # names from files are no markup
    console.print(table)
    console.print(weights)
