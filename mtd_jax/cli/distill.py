"""`mtd distill-data`: the base model writes the text that heads are trained on."""

from __future__ import annotations

import argparse
import dataclasses
import json
import statistics
import sys
from collections import Counter
from pathlib import Path
from typing import Any

from mtd_jax.cli import arguments
from mtd_jax.cli.resumable import ResumableLines, open_lines
from mtd_jax.cli.session import Choice, open_method, open_model
from mtd_jax.cli.termination import Terminated
from mtd_jax.decoding.language_model import LanguageModel
from mtd_jax.decoding.metrics import Metrics
from mtd_jax.decoding.requests import DEFAULT_NEW_TOKENS, read_prompts
from mtd_jax.errors import InputError
from mtd_jax.progress import progress
from mtd_jax.training.distill import Plan, Recipe, Task, answer, batches, make_plan

_DESCRIPTION = """\
Let a model answer prompts, many at a time; its own answers are the best text to train heads on.

  mtd distill-data --model models/smollm2 --prompts prompts.jsonl --out answers.jsonl
  mtd distill-data --model models/smollm2 --prompts prompts.jsonl --out answers.jsonl \\
      --limit 20000 --batch-size 32 --temperatures 0,0.7,1 --samples 2

--prompts is a file as for `mtd generate`. --out gets one JSON object a line:
  {"id", "token_ids": prompt and answer with its end token, "prompt_tokens": how many of them are
   the prompt, "temperature", "seed", "finish_reason", "answer_text"}

Each answer takes one of the temperatures; which one, and what it draws, follow from --seed and the
prompt's id alone. A run that was stopped, even killed, goes on when the same command is given
again, and comes to the same answers. FILE.meta.json beside --out keeps the settings.

An accelerator answers many prompts in the time of one: give as large a --batch-size as its memory
allows. On a CPU, try a few sizes with --limit and compare the tokens/s. --method ngram and others
that are lossless write the same text in fewer passes.
"""


def add_parser(commands: arguments.Subparsers) -> None:
    """Declares the command."""
    parser = commands.add_parser(
        "distill-data", help="a model's own answers, to train heads on", description=_DESCRIPTION
    )
    arguments.add_model_arguments(parser)
    arguments.add_method_arguments(parser)
    source = parser.add_argument_group("prompts")
    source.add_argument("--prompts", required=True, metavar="FILE.jsonl", help="what to answer")
    source.add_argument("--limit", type=int, metavar="N", help="only the first N prompts")
    source.add_argument(
        "--max-prompt-tokens",
        type=int,
        default=2048,
        metavar="N",
        help="longer prompts are left out (default: 2048)",
    )
    group = parser.add_argument_group("answers")
    group.add_argument(
        "--max-new-tokens",
        type=int,
        default=DEFAULT_NEW_TOKENS,
        metavar="N",
        help=f"longest answer (default: {DEFAULT_NEW_TOKENS})",
    )
    group.add_argument(
        "--temperatures",
        default="0,0.7,1",
        metavar="T,T,...",
        help="a mix; 0 is greedy (default: 0,0.7,1)",
    )
    group.add_argument("--top-p", type=float, default=1.0, metavar="P", help="nucleus (default: 1)")
    group.add_argument(
        "--samples", type=int, default=1, metavar="N", help="answers a prompt (default: 1)"
    )
    group.add_argument("--seed", type=int, default=0, metavar="S", help="of the draws (default: 0)")
    group.add_argument(
        "--batch-size", type=int, default=16, metavar="B", help="decoded together (default: 16)"
    )
    output = parser.add_argument_group("output")
    output.add_argument("--out", required=True, metavar="FILE.jsonl", help="where answers go")
    output.add_argument("--force", action="store_true", help="throw away what is in --out")
    output.add_argument("--json", action="store_true", help="print one JSON object at the end")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Runs the command."""
    arguments.check_positive(args, "limit", "batch_size")
    names = [field.name for field in dataclasses.fields(Recipe) if field.name != "temperatures"]
    recipe = Recipe(
        temperatures=_temperatures(args.temperatures), **{n: getattr(args, n) for n in names}
    )
    choice = open_method(args)
    prompts = read_prompts(args.prompts)[: args.limit]
    out = Path(args.out)
    if out.exists() and out.samefile(args.prompts):
        raise InputError("--out is the file of the prompts")
    model = open_model(args)
    plan = make_plan(model, prompts, recipe)
    settings = {
        **dataclasses.asdict(recipe),
        "model": model.fingerprint,
        "dtype": str(model.params.embedding.dtype),
        "method": [args.method, *sorted(args.option)],
        "heads": None if choice.file is None else dict(choice.file.options),
        "prompts": plan.fingerprint,
    }
    ids = {task.id for task in plan.tasks}
    if len(ids) < len(plan.tasks):
        raise InputError("an id of a prompt ends with '#' and a number, like those of --samples")
    with open_lines(out, settings, ids, force=args.force) as lines:
        before = len(lines.done)
        try:
            metrics = _answer_all(model, choice, plan, lines, args)
        except (KeyboardInterrupt, Terminated):
            print(
                f"mtd: {len(lines.done)} of {len(ids)} answers are in {out}; the same command "
                "goes on",
                file=sys.stderr,
            )
            raise
    _report(args, plan, before, metrics)
    return 0


def _answer_all(
    model: LanguageModel,
    choice: Choice,
    plan: Plan,
    lines: ResumableLines,
    args: argparse.Namespace,
) -> Metrics:
    """Writes what is missing.

    Batches are those of the whole plan. One that a killed run left half written is decoded whole
    again, so that each answer comes from the same batch, and is the same to the last bit.
    """
    missing: list[tuple[list[Task], list[str]]] = []
    for batch in batches(plan.tasks, args.batch_size):
        wanted = [task.id for task in batch if task.id not in lines.done]
        if wanted:
            missing.append((batch, wanted))
    metrics = Metrics(prompts=0)
    if not missing:
        return metrics
    length = int(statistics.median_high([len(task.token_ids) for task in plan.tasks]))
    method = choice.fitted(model, batch_size=args.batch_size, prompt_tokens=length)
    tokens = 0
    with progress("answering", len(plan.tasks), done=len(lines.done)) as shown:

        def seen(count: int) -> None:
            nonlocal tokens
            tokens += count
            shown.update(note=f"{tokens / max(shown.elapsed, 1e-3):.0f} tokens/s")

        for batch, wanted in missing:
            found, cost = answer(model, method, batch, args.batch_size, seen)
            lines.append([line for line in found if line["id"] in wanted])
            shown.advance(len(wanted))
            metrics = dataclasses.replace(
                metrics,
                prompts=metrics.prompts + len(wanted),
                tokens=metrics.tokens + cost.tokens,
                seconds=metrics.seconds + cost.seconds,
                compile_seconds=metrics.compile_seconds + cost.compile_seconds,
            )
    return metrics


def _report(args: argparse.Namespace, plan: Plan, before: int, metrics: Metrics) -> None:
    temperatures = Counter(f"{task.sampling.temperature:g}" for task in plan.tasks)
    report: dict[str, Any] = {
        "out": args.out,
        "answers": len(plan.tasks),
        "there_before": before,
        "prompts_left_out": plan.left_out,
        "temperatures": dict(sorted(temperatures.items())),
        "new_tokens": metrics.tokens,
        "seconds": round(metrics.seconds, 3),
        "tokens_per_second": round(metrics.tokens_per_second, 1),
        "compile_seconds": round(metrics.compile_seconds, 3),
    }
    if args.json:
        print(json.dumps(report))
        return
    print(f"{args.out}: {report['answers']} answers, {before} of them there before")
    if plan.left_out:
        print(f"left out {plan.left_out} prompts of over {args.max_prompt_tokens} tokens")
    if metrics.tokens:
        print(
            f"[{metrics.tokens} tokens in {metrics.seconds:.1f} s: "
            f"{metrics.tokens_per_second:.1f} tokens/s; compilation "
            f"{metrics.compile_seconds:.1f} s apart]",
            file=sys.stderr,
        )


def _temperatures(text: str) -> tuple[float, ...]:
    try:
        return tuple(float(word) for word in text.split(","))
    except ValueError:
        raise InputError(f"--temperatures takes numbers like 0,0.7,1, got '{text}'") from None
