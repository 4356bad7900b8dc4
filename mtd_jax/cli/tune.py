"""`mtd tune`: finds settings of a method that fit a model."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from rich.console import Console

from mtd_jax.cli import arguments
from mtd_jax.cli.session import open_model
from mtd_jax.convert.atomic import write_file
from mtd_jax.convert.method_files import FILE, MethodFile, read_method, write_method
from mtd_jax.decoding.language_model import LanguageModel
from mtd_jax.decoding.requests import Prompt, read_prompts
from mtd_jax.errors import InputError
from mtd_jax.evaluation import environment
from mtd_jax.evaluation.tune_skip import Candidate, SkipSearch
from mtd_jax.progress import progress

_DESCRIPTION = """\
Find settings of a method that fit your model and prompts; no training.

  mtd tune self-speculative --model models/smollm2 --prompts prompts.jsonl --out tuned/skip
  mtd generate --model models/smollm2 --method self_speculative --heads tuned/skip --prompt "..."
"""
_SKIP_DESCRIPTION = """\
Search the sublayers that the model leaves out while it drafts for itself.

The objective is the speed-up to expect: tokens a step over the weights it reads. It measures no
time, so the search finds the same every time. What was tried is kept in DIR/search.json, so a
search that was stopped goes on where it was.
"""
_SEARCH_FILE = "search.json"
_METHOD = "self_speculative"


def add_parser(commands: arguments.Subparsers) -> None:
    """Declares the command."""
    parser = commands.add_parser(
        "tune", help="search what a method does without training", description=_DESCRIPTION
    )
    kinds = parser.add_subparsers(
        title="methods", dest="kind", required=True, metavar="METHOD", parser_class=arguments.Parser
    )
    skip = kinds.add_parser(
        "self-speculative",
        help="find the sublayers that drafts leave out",
        description=_SKIP_DESCRIPTION,
    )
    arguments.add_model_arguments(skip)
    skip.add_argument("--prompts", required=True, metavar="FILE.jsonl", help="to try sets on")
    skip.add_argument(
        "--limit", type=int, default=8, metavar="N", help="only the first N prompts (default: 8)"
    )
    skip.add_argument(
        "--max-new-tokens",
        type=int,
        default=48,
        metavar="N",
        help="how much the model writes for each; sets are tried on that (default: 48)",
    )
    skip.add_argument(
        "--evaluations",
        type=int,
        metavar="N",
        help="sets to try at most (default: six for each layer)",
    )
    skip.add_argument("--out", required=True, metavar="DIR", help="where the result goes")
    skip.add_argument("--json", action="store_true", help="print one JSON object")
    skip.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Runs `mtd tune self-speculative`."""
    arguments.check_positive(args, "limit", "max_new_tokens", "evaluations")
    prompts = read_prompts(args.prompts)[: args.limit]
    out = Path(args.out)
    _check_free(out)
    model = open_model(args)
    evaluations = args.evaluations or 6 * model.config.num_layers
    log = _Log(out / _SEARCH_FILE, model, prompts, args.max_new_tokens)
    log.save()  # an `out` that cannot be written is found now, not behind the search
    with Console(stderr=True).status("the model writes the texts to try sets on"):
        search = SkipSearch(model, prompts, new_tokens=args.max_new_tokens, known=log.known)
    best = _searched(search, evaluations, log)
    options = {
        "skip_attention": ",".join(map(str, sorted(best.skip.attention))),
        "skip_mlp": ",".join(map(str, sorted(best.skip.mlp))),
        "agreement": round(best.agreement, 4),
        "share": round(search.share(best.skip), 4),
    }
    record = {
        "expected_speedup": round(best.objective, 4),
        "best_number_of_drafts": best.drafts,
        "evaluations": len(search.known),
        "prompts": len(prompts),
        "new_tokens": args.max_new_tokens,
        "model": model.source,
        "versions": environment.versions(),
        **environment.provenance(),
    }
    write_method(out, MethodFile(_METHOD, options, model.fingerprint, record))
    if args.json:
        print(json.dumps({"out": args.out, "options": options, "record": record}))
    else:
        _show(best, options, args.out)
    return 0


def _check_free(out: Path) -> None:
    """Refuses a directory where another method's settings, and perhaps its heads, would be lost."""
    if (out / FILE).exists() and (found := read_method(out).method) != _METHOD:
        raise InputError(f"{out} holds what was trained for method '{found}': give another --out")


class _Log:
    """What was tried before on the same texts, kept on disk."""

    def __init__(
        self, path: Path, model: LanguageModel, prompts: list[Prompt], new_tokens: int
    ) -> None:
        self._path = path
        self._about = {
            "model": model.fingerprint,
            "new_tokens": new_tokens,
            "prompts": [str(p) for p in prompts],
        }
        self.known: dict[str, float] = {}
        try:
            values: Any = json.loads(path.read_text(encoding="utf-8"))
            if values["about"] == self._about:
                found = values["agreement"].items()
                self.known.update({k: v for k, v in found if isinstance(v, float) and 0 <= v <= 1})
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            pass  # nothing usable was there: everything is tried anew

    def save(self) -> None:
        values = {"about": self._about, "agreement": self.known}
        write_file(self._path, json.dumps(values, indent=1) + "\n")


def _searched(search: SkipSearch, evaluations: int, log: _Log) -> Candidate:
    with progress("trying sets", evaluations) as shown:

        def tried(best: Candidate) -> None:
            left_out = len(best.skip.attention) + len(best.skip.mlp)
            note = f"best so far: {left_out} sublayers left out, {best.agreement:.0%} agreement"
            shown.advance(note=note)
            if not len(log.known) % 10:
                log.save()

        try:
            return search.search(evaluations, tried)
        finally:
            log.save()


def _show(best: Candidate, options: dict[str, object], out: str) -> None:
    print(f"skip_attention={options['skip_attention']}")
    print(f"skip_mlp={options['skip_mlp']}")
    print(f"drafts right {best.agreement:.1%}; expected speed-up {best.objective:.2f}x", end="")
    print(f" with {best.drafts} drafts" if best.drafts else ": no gain is to be expected")
    print(f"written to {out}; use it with --method self_speculative --heads {out}")
