"""`mtd bench`: how fast methods decode."""

from __future__ import annotations

import argparse
import functools
import itertools
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from mtd_jax import methods
from mtd_jax.cli import arguments
from mtd_jax.cli.session import Choice, choose_method, open_model, sampling_of, typical_length
from mtd_jax.convert.atomic import write_file
from mtd_jax.convert.method_files import MethodFile, read_method
from mtd_jax.decoding.language_model import LanguageModel
from mtd_jax.decoding.method import Method
from mtd_jax.decoding.requests import Prompt, read_prompts
from mtd_jax.errors import InputError, unknown_name
from mtd_jax.evaluation import environment, plot, step_cost
from mtd_jax.evaluation.bench import (
    BASELINE,
    BenchResult,
    Row,
    bench,
    passes,
    speedup_text,
    to_json,
)
from mtd_jax.progress import progress

_DESCRIPTION = """\
Measure decoding speed on your own model and prompts.

  mtd bench --model models/smollm2 --prompts prompts.jsonl --methods ar,ngram,prompt_lookup
  mtd bench --model models/smollm2 --prompts prompts.jsonl --methods ar,ngram:drafts=4,ngram
  mtd bench --model models/smollm2 --prompts prompts.jsonl --methods ar,ngram --batch-sizes 1,4 \\
      --auto --out results.json --plot results.png

Methods take turns batch by batch, so that all meet the same machine; a speed-up is the median of
ratios to ar within a repeat. The roofline share says how close a speed comes to reading the weights
from memory once a step. A method's options follow its name behind colons. Methods that choose their
number of drafts (drafts=auto, the default of ngram and prompt_lookup) choose by step costs measured
on this machine, which are kept for the next run; --auto measures them anew and shows them.
The method ar:again is plain decoding once more: its speed-up is what noise looks like here.
"""
_DEFAULT_NEW_TOKENS = 128
_FILE_WIDTH = 150
_CONTROL = f"{BASELINE}:again"
"""The same method under another label: what differs then is noise."""


def add_parser(commands: arguments.Subparsers) -> None:
    """Declares the command."""
    parser = commands.add_parser("bench", help="measure decoding speed", description=_DESCRIPTION)
    arguments.add_model_arguments(parser)
    parser.add_argument(
        "--methods",
        default=BASELINE,
        metavar="M,M:KEY=VALUE,...",
        help="methods to compare, ar among them for speed-ups (default: ar)",
    )
    parser.add_argument(
        "--heads",
        action="extend",
        nargs="+",
        default=[],
        metavar="DIR",
        help="what was trained or tuned for methods of the list; each says for which "
        "(two for one method: tell them apart like cp:rank=2)",
    )
    parser.add_argument("--prompts", required=True, metavar="FILE.jsonl", help="what to decode")
    parser.add_argument(
        "--category",
        action="append",
        default=[],
        metavar="NAME",
        help="only prompts whose lines say so (may be given several times)",
    )
    parser.add_argument("--limit", type=int, metavar="N", help="only the first N of these prompts")
    parser.add_argument("--batch-sizes", default="1", metavar="B,B,...", help="default: 1")
    parser.add_argument("--repeats", type=int, default=3, metavar="N", help="default: 3")
    parser.add_argument(
        "--auto",
        action="store_true",
        help="measure what steps cost now, and show it; methods with drafts=auto choose their "
        "number of drafts by it, 0 included",
    )
    parser.add_argument(
        "--ignore-eos", action="store_true", help="decode the whole budget for every prompt"
    )
    arguments.add_sampling_arguments(parser)
    parser.add_argument("--out", metavar="FILE.json", help="write the result here too")
    parser.add_argument("--plot", metavar="FILE.png", help="draw speed-ups and acceptance here")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Runs the command."""
    if args.stop:
        raise InputError("bench does not take --stop")
    arguments.check_positive(args, "repeats", "limit")
    for path in filter(None, (args.out, args.plot)):
        if Path(path).is_dir() or not Path(path).parent.is_dir():
            raise InputError(f"cannot write {path}: it is a directory, or is in none")
    if args.plot is not None:
        plot.check_drawable(Path(args.plot))
    sampling = sampling_of(args)
    choices = _choices(args.methods, args.heads)
    if args.plot is not None and BASELINE not in [choice.label for choice in choices]:
        raise InputError(f"--plot draws speed-ups over {BASELINE}: --methods must name it too")
    sizes = _different([_positive(text) for text in args.batch_sizes.split(",")], "--batch-sizes")
    prompts = _of_categories(read_prompts(args.prompts), args.category)[: args.limit]
    model = open_model(args)
    fitter = _Fitter(model, typical_length(model, prompts), fresh=args.auto)
    steps = passes(len(choices), len(prompts), sizes, args.repeats)
    begun = itertools.count()
    with progress("measuring memory bandwidth", steps) as shown:
        result = bench(
            model,
            {choice.label: functools.partial(fitter.fit, choice) for choice in choices},
            prompts,
            batch_sizes=sizes,
            max_new_tokens=args.max_new_tokens
            if args.max_new_tokens is not None
            else _DEFAULT_NEW_TOKENS,
            sampling=sampling,
            ignore_eos=args.ignore_eos,
            repeats=args.repeats,
            progress=lambda what: shown.update(next(begun), description=what),
        )
    measured = to_json(result)
    report = {
        "hardware": environment.hardware(),
        "versions": environment.versions(),
        **environment.provenance(),
        "model": {"path": args.model, "source": model.source, "fingerprint": model.fingerprint},
        "dtype": str(model.params.embedding.dtype),
        "prompts": len(prompts),
        "step_costs": fitter.costs,
        **measured,
    }
    if args.out is not None:
        write_file(Path(args.out), json.dumps(report, indent=2) + "\n")
    if args.plot is not None:
        plot.plot_bench(measured["rows"], Path(args.plot))
    if args.json:
        print(json.dumps(report))
    else:
        _show(result, fitter.costs if args.auto else [])
    return 0


class _Fitter:
    """Fits methods to the model and keeps what their steps cost, for the report."""

    def __init__(self, model: LanguageModel, prompt_tokens: int, *, fresh: bool) -> None:
        self._model = model
        self._prompt_tokens = prompt_tokens
        self._fresh = fresh
        self.costs: list[dict[str, Any]] = []

    def fit(self, choice: Choice, batch_size: int) -> Method:
        """The method for a batch size."""
        method: Any = choice.fitted(
            self._model,
            batch_size=batch_size,
            prompt_tokens=self._prompt_tokens,
            fresh=self._fresh,
        )
        if step_cost.is_adaptive(method):
            milliseconds = [round(1e3 * float(cost), 3) for cost in method.costs]
            entry = {"method": choice.label, "batch_size": batch_size}
            self.costs.append(entry | {"rows": list(method.sizes), "milliseconds": milliseconds})
        return method


def _choices(text: str, heads: Sequence[str]) -> list[Choice]:
    """The methods of `ar,ngram:drafts=4,...`, each with the heads that are for it."""
    labels = text.split(",")
    if not all(labels):
        raise InputError(f"--methods '{text}' has a comma with no method beside it")
    _different(labels, "--methods")
    files = {h: read_method(arguments.existing_path(h, "heads")) for h in heads}
    choices, taken = [], set()
    for label in labels:
        name, *options = (BASELINE if label == _CONTROL else label).split(":")
        given = arguments.parse_options(options)
        directory = _heads_for(label, name, given, files)
        choices.append(choose_method(name, directory, given, label))
        taken.add(directory)
    for directory, file in files.items():
        if directory not in taken:
            raise InputError(
                f"{directory} is for method '{file.method}': --methods names none such"
            )
    return choices


def _heads_for(
    label: str, name: str, options: Mapping[str, str], files: Mapping[str, MethodFile]
) -> str | None:
    """Of several heads for a method those that were trained with these options."""
    found = [path for path, file in files.items() if file.method == name]
    if len(found) > 1:
        trained = methods.trained_otherwise
        found = [path for path in found if trained(name, files[path].options, options) is None]
        if len(found) != 1:
            raise InputError(
                f"{len(found) or 'none'} of --heads fit '{label}': say what one was trained with, "
                f"like {name}:OPTION=VALUE"
            )
    return found[0] if found else None


def _different(values: list[Any], flag: str) -> list[Any]:
    for value in values:
        if values.count(value) > 1:
            raise InputError(f"{flag} names {value} twice")
    return values


def _positive(text: str) -> int:
    if not text.strip().isdecimal() or len(text) > 6 or int(text) < 1:
        raise InputError(f"--batch-sizes takes whole numbers of at least 1, got '{text[:20]}'")
    return int(text)


def _of_categories(prompts: list[Prompt], wanted: Sequence[str]) -> list[Prompt]:
    known = {prompt.category for prompt in prompts if prompt.category is not None}
    for name in wanted:
        if name not in known:
            raise unknown_name("category of prompts", name, known)
    return [prompt for prompt in prompts if not wanted or prompt.category in wanted]


def _show(result: BenchResult, costs: Sequence[dict[str, Any]]) -> None:
    table = Table(title=f"memory bandwidth {result.bandwidth / 1e9:.1f} GB/s")
    for column in ("method", "batch", "tokens/s", "decode tokens/s", "spread", "vs ar"):
        table.add_column(column, justify="left" if column == "method" else "right")
    for column in ("acceptance", "roofline", "same as ar", "compile s"):
        table.add_column(column, justify="right")
    for row in result.rows:
        length = row.metrics.mean_acceptance_length
        table.add_row(
            row.method if row.lossless else f"{row.method} (lossy)",
            str(row.batch_size),
            f"{row.tokens_per_second:.1f}",
            f"{row.decode_tokens_per_second:.1f}",
            "-" if row.spread is None else f"{row.spread:.0%}",
            speedup_text(row.speedup_vs_ar, row.speedup_range),
            "-" if length is None else f"{length:.2f}",
            f"{row.roofline_share:.0%}",
            "-" if row.identical_to_ar is None else "yes" if row.identical_to_ar else "NO",
            f"{row.compile_seconds:.1f}",
        )
    console = Console()
    if not console.is_terminal:
        console = Console(width=_FILE_WIDTH)
    console.print(table)
    for entry in costs:
        pairs = zip(entry["rows"], entry["milliseconds"], strict=True)
        cells = ", ".join(f"{rows}: {ms:.1f} ms" for rows, ms in pairs)
        text = f"step by rows, {entry['method']}, batch {entry['batch_size']}: {cells}"
        console.print(text, soft_wrap=True)
    for row in result.rows:
        for line in _warnings(row):
            console.print(line, soft_wrap=True)


def _warnings(row: Row) -> list[str]:
    """What must not be overlooked, in words; of the baseline, once or again, there is nothing."""
    if row.method.partition(":")[0] == BASELINE:
        return []
    lines = []
    if row.own_reference:
        lines.append(
            f"{row.method} is another model than ar, so that only their speeds can be compared; "
            "`mtd verify` holds its tokens against its own plain decoding"
        )
    if row.lossless and not row.metrics.drafted:
        lines.append(
            f"{row.method} at batch {row.batch_size} drafted nothing, so it was plain decoding: no "
            "guess was worth what steps of several rows cost here"
        )
    if row.verdict == "slower":
        lines.append(
            f"{row.method} at batch {row.batch_size} is SLOWER than plain decoding "
            f"({row.speedup_vs_ar:.2f}x): do not use it here"
        )
    for category, report in row.by_category.items():
        if report["speedup_vs_ar"] is not None and report["speedup_vs_ar"] < 0.95:
            lines.append(
                f"{row.method} at batch {row.batch_size} is slower on '{category}' prompts "
                f"({report['speedup_vs_ar']:.2f}x)"
            )
    return lines
