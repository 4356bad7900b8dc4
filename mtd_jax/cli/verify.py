"""`mtd verify`: proves on your own model and prompts that a method changes nothing."""

from __future__ import annotations

import argparse
import itertools
import json
import sys

from mtd_jax.cli import arguments
from mtd_jax.cli.session import open_method, open_model, typical_length
from mtd_jax.decoding.requests import read_prompts
from mtd_jax.evaluation.losslessness import LosslessReport, verify
from mtd_jax.progress import progress

_DESCRIPTION = """\
Check that a method emits exactly the tokens of plain decoding, on your own model and prompts.

  mtd verify --model models/smollm2 --method ngram --prompts prompts.jsonl

Every prompt is decoded greedily, with ar alone and with the method. A pass over several rows rounds
differently, so where two logits tie the texts may part: that passes only if the gap is explained by
rounding (under 1e-4 in float32, at most one unit in the last place in bfloat16). Exit code 1 if any
prompt fails.
"""
_DEFAULT_NEW_TOKENS = 128


def add_parser(commands: arguments.Subparsers) -> None:
    """Declares the command."""
    parser = commands.add_parser(
        "verify", help="check that a method is lossless", description=_DESCRIPTION
    )
    arguments.add_model_arguments(parser)
    arguments.add_method_arguments(parser)
    parser.add_argument("--prompts", required=True, metavar="FILE.jsonl", help="what to decode")
    parser.add_argument("--limit", type=int, metavar="N", help="only the first N prompts")
    parser.add_argument(
        "--batch-size", type=int, default=1, metavar="B", help="of the method (default: 1)"
    )
    parser.add_argument(
        "--max-new-tokens",
        type=int,
        default=_DEFAULT_NEW_TOKENS,
        metavar="N",
        help=f"budget (default: {_DEFAULT_NEW_TOKENS})",
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Runs the command."""
    arguments.check_positive(args, "batch_size", "limit")
    choice = open_method(args)
    prompts = read_prompts(args.prompts)[: args.limit]
    model = open_model(args)
    length = typical_length(model, prompts)
    method = choice.fitted(model, batch_size=args.batch_size, prompt_tokens=length)
    passes = 2 * -(-len(prompts) // args.batch_size)
    begun = itertools.count()
    with progress("decoding", passes) as shown:
        report = verify(
            model,
            method,
            prompts,
            max_new_tokens=args.max_new_tokens,
            batch_size=args.batch_size,
            progress=lambda what: shown.update(next(begun), description=what),
        )
    if args.json:
        about = {
            "model": args.model,
            "method": args.method,
            "lossless": method.lossless,
            "dtype": str(model.params.embedding.dtype),
        }
        print(json.dumps(about | report.to_dict()))
    else:
        _show(report)
    _warn(report, args.method, lossless=method.lossless)
    return 0 if report.passed else 1


def _show(report: LosslessReport) -> None:
    for c in report.comparisons:
        if c.identical:
            continue
        gap = "one text ends before the other" if c.logit_gap is None else f"gap {c.logit_gap:.2e}"
        if c.allowed_gap is not None:
            gap += f", allowed {c.allowed_gap:.2e}"
        verdict = "tie" if c.passed else "FAILED"
        print(f"{verdict}: prompt {c.id} parts at new token {c.position} ({gap})")
    facts = report.to_dict()
    print(
        f"{facts['identical']} of {facts['prompts']} prompts identical to ar, {facts['ties']} "
        f"parted at a tie, {facts['failed']} failed; {facts['tokens']} tokens compared, "
        f"{facts['num_accepted_draft_tokens']} of {facts['num_draft_tokens']} drafts accepted"
    )


def _warn(report: LosslessReport, name: str, *, lossless: bool) -> None:
    """What a report that passed does not prove, on stderr beside text and JSON alike."""
    if lossless and not report.to_dict()["num_draft_tokens"]:
        print(
            f"'{name}' drafted nothing: this compared plain decoding with itself (auto drafts "
            "where that pays; give a number, --option drafts=4)",
            file=sys.stderr,
        )
    if not lossless:
        print(f"'{name}' with these options is lossy by construction", file=sys.stderr)
