"""The recipes' own corpus and prompts, from sources that a machine can be given without a login.

    python -m train.corpus --out corpus --gsm8k gsm8k_train.jsonl
    python -m train.corpus --out corpus-small --size small --offline

Conversations, maths, code and prose: about 50 M tokens, or 1 M with `--size small`,
which takes only what is already there. OUT gets

    train.jsonl     {"id", "source", "messages": [{"role", "content"}, ...]}, or "text" for these
    held_out.jsonl  the same, never to be trained on
    prompts.jsonl   user turns for `mtd distill-data`: theirs, and instructions made of patterns
    manifest.json   sources with licences, versions and counts; checksums; how it was made

Packages are downloaded once, into --downloads, with pip and (on Debian) apt; what cannot be had may
be put there by hand or left out with --skip. BIG-bench is not among them: it asks that its data
never appear in training corpora.

The same sources and seed give the same bytes. Documents that say the same but for case, spaces and
punctuation are one document, and what a document says decides whether it is held out, so nothing
held out is trained on under another name. `--exclude` keeps the prompts of evaluations out of it.
"""

from __future__ import annotations

import shlex
import sys
from pathlib import Path

from mtd_jax.cli.arguments import Parser
from mtd_jax.decoding.requests import read_prompts
from mtd_jax.errors import InputError, unknown_name
from mtd_jax.tokenizer import Tokenizer
from train.texts.assemble import ASKED, build
from train.texts.instructions import instructions
from train.texts.sources import SOURCES, Found, MissingError, locate


def make_parser() -> Parser:
    """The command line."""
    parser = Parser(prog="python -m train.corpus", description=__doc__)
    parser.add_argument("--out", required=True, metavar="DIR", help="must not be there yet")
    parser.add_argument("--size", choices=["small", "full"], default="full")
    parser.add_argument(
        "--downloads",
        default="downloads",
        metavar="DIR",
        help="where downloaded packages are kept (default: downloads)",
    )
    parser.add_argument("--offline", action="store_true", help="download nothing")
    parser.add_argument("--gsm8k", metavar="FILE", help="the training half of GSM8K, as messages")
    parser.add_argument(
        "--skip",
        action="extend",
        nargs="+",
        default=[],
        metavar="NAME",
        help="sources to leave out",
    )
    parser.add_argument(
        "--exclude",
        action="extend",
        nargs="+",
        default=[],
        metavar="FILE.jsonl",
        help="prompts of evaluations, which must not be in the corpus",
    )
    parser.add_argument(
        "--held-out", type=float, default=0.01, metavar="X", help="share (default: 0.01)"
    )
    parser.add_argument(
        "--seed", type=int, default=0, metavar="S", help="of the order (default: 0)"
    )
    parser.add_argument("--tokenizer", metavar="DIR", help="count tokens with a model's tokenizer")
    return parser


def find_sources(
    names: list[str], downloads: Path, gsm8k: str | None, *, small: bool, offline: bool
) -> list[Found]:
    """Where the sources lie on this machine, downloaded if need be.

    Raises:
      InputError: a source cannot be had, and nobody said to leave it out.
    """
    known = {name for source in SOURCES for name in (source.name, source.package) if name} | {ASKED}
    for name in names:
        if name not in known:
            raise unknown_name("source", name, known)
    found = []
    for source in SOURCES:
        if source.name in names or source.package in names:
            continue
        try:
            found.append(locate(source, downloads, gsm8k, offline=offline or small))
        except MissingError as error:
            if not small:
                raise InputError(
                    f"cannot have {source.name}: {error} (--skip {source.name} leaves it out)"
                ) from None
    return found


def main(argv: list[str] | None = None) -> int:
    """Builds the corpus."""
    args = make_parser().parse_args(argv)
    if not 0.0 <= args.held_out < 1.0:
        raise InputError(f"--held-out is a share from 0 to 1, got {args.held_out:g}")
    excluded = [
        turn["content"]
        for path in args.exclude
        for prompt in read_prompts(path)
        for turn in prompt.messages or ({"role": "user", "content": prompt.text or ""},)
        if turn["role"] == "user"
    ]
    tokenizer = None if args.tokenizer is None else Tokenizer.load(args.tokenizer)
    found = find_sources(
        args.skip,
        Path(args.downloads),
        args.gsm8k,
        small=args.size == "small",
        offline=args.offline,
    )
    words = sys.argv[1:] if argv is None else argv
    manifest = build(
        found,
        Path(args.out),
        size=args.size,
        seed=args.seed,
        share=args.held_out,
        excluded=excluded,
        asked=() if ASKED in args.skip else instructions(),
        tokenizer=tokenizer,
        about={
            "command": shlex.join(["python", "-m", "train.corpus", *words]),
            "tokenizer": args.tokenizer,
            "excluded_prompts": len(excluded),
            "skipped": sorted(args.skip),
        },
    )
    for name, counts in manifest["sources"].items():
        print(f"{name:22}{counts.get('train_documents', 0):>9,} documents", end="")
        print(f"{counts.get('tokens', counts.get('characters', 0)):>14,}", end=" ")
        print("tokens" if tokenizer else "characters")
    print(f"written to {args.out}")
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except (InputError, OSError) as error:
        print(f"corpus.py: error: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("corpus.py: interrupted", file=sys.stderr)
        sys.exit(130)
