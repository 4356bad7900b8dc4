"""What the programs on one page (`infer/`, `train/`) share around their loops."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable

from mtd_jax.backend import leave_libtpu_alone
from mtd_jax.cli.arguments import Parser
from mtd_jax.decoding.language_model import LanguageModel
from mtd_jax.decoding.requests import EncodedPrompt, Prompt, encode
from mtd_jax.errors import InputError


def make_parser(description: str | None) -> Parser:
    """A parser; of the program's docstring, the first paragraph shows."""
    return Parser(description=(description or "").split("\n\n")[0])


def prompt_parser(description: str | None) -> Parser:
    """What a program is told that answers one prompt."""
    parser = make_parser(description)
    parser.add_argument("--model", required=True)
    parser.add_argument("--prompt")
    parser.add_argument("--token-ids", help="in place of --prompt: 5,6,7")
    parser.add_argument("--max-new-tokens", type=int, default=64)
    return parser


def encoded(model: LanguageModel, args: argparse.Namespace) -> EncodedPrompt:
    """The prompt of `prompt_parser`.

    Raises:
      InputError: no numbers, no prompt, or one that does not fit.
    """
    try:
        ids = tuple(int(i) for i in args.token_ids.split(",")) if args.token_ids else None
    except ValueError:
        raise InputError(f"--token-ids takes numbers like 5,6,7, got '{args.token_ids}'") from None
    prompt = Prompt("0", text=None if ids else args.prompt, token_ids=ids)
    budget = args.max_new_tokens
    return encode(prompt, model.config, model.tokenizer, max_new_tokens=budget, chat=None)


def show(model: LanguageModel, text: list[int], request: EncodedPrompt, passes: int) -> None:
    """Prints what stands behind the prompt, and how many tokens a pass brought.

    What was accepted behind the budget or an end token does not count.
    """
    start = len(request.token_ids)
    end, stops = start + request.budget, set(model.eos_token_ids)
    ends = [i + 1 for i in range(start, len(text)) if text[i] in stops]
    new = text[start : min([end, *ends])]
    print(model.tokenizer.decode(new) if model.tokenizer is not None else new)
    print(f"[{len(new)} tokens in {passes} passes: {len(new) / passes:.2f} tokens a pass]")


def run(main: Callable[[], None], name: str) -> None:
    """Ends the process with one line and 2 where the input is wrong."""
    leave_libtpu_alone()
    try:
        main()
    except (InputError, OSError) as error:
        print(f"{name}: error: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(2)
