"""`mtd chat`: a conversation in the terminal."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator

from rich.console import Console, Group
from rich.live import Live
from rich.text import Text

from mtd_jax.cli import arguments
from mtd_jax.cli.session import open_method, open_model, sampling_of
from mtd_jax.decoding.generate import Chunk, generate
from mtd_jax.decoding.language_model import LanguageModel
from mtd_jax.decoding.method import Method
from mtd_jax.decoding.requests import Message, Prompt
from mtd_jax.decoding.sampling import Sampling
from mtd_jax.errors import InputError

_DESCRIPTION = """\
Talk to a model.

  mtd chat --model models/smollm2 --temperature 0.7

/reset forgets the conversation, /exit or end of input leaves. Ctrl-C stops an answer.
"""
_DEFAULT_NEW_TOKENS = 1024
_TYPICAL_TURN = 256


def add_parser(commands: arguments.Subparsers) -> None:
    """Declares the command."""
    parser = commands.add_parser("chat", help="talk to a model", description=_DESCRIPTION)
    arguments.add_model_arguments(parser)
    arguments.add_method_arguments(parser)
    arguments.add_sampling_arguments(parser)
    parser.add_argument("--system", metavar="TEXT", help="a system message")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Runs the command."""
    sampling = sampling_of(args)
    choice = open_method(args)
    model = open_model(args)
    if model.tokenizer is None or not model.tokenizer.has_chat_template:
        raise InputError("chat needs a tokenizer with a chat template, and the model has none")
    method = choice.fitted(model, batch_size=1, prompt_tokens=_TYPICAL_TURN)
    console = Console()
    if not method.lossless:
        console.print(Text("LOSSY acceptance", style="dim"))
    opening: list[Message] = []
    if args.system is not None:
        opening = [{"role": "system", "content": args.system}]
    history = list(opening)
    budget = _DEFAULT_NEW_TOKENS if args.max_new_tokens is None else args.max_new_tokens
    while (line := _read(console)) is not None:
        if line == "/exit":
            break
        if line == "/reset":
            history = list(opening)
        elif line:
            turn: list[Message] = [*history, {"role": "user", "content": line}]
            try:
                answer = _answer(console, model, method, turn, sampling, budget, args.stop)
            except InputError as error:  # too long for the context, say: the rest is still good
                console.print(Text(f"{error} (/reset begins anew)", style="red"))
                continue
            history = [*turn, {"role": "assistant", "content": answer}]
    return 0


def _read(console: Console) -> str | None:
    """The user's next line; None at the end of input."""
    try:
        return console.input("[bold cyan]> [/]" if sys.stdin.isatty() else "").strip()
    except EOFError:
        return None


def _answer(
    console: Console,
    model: LanguageModel,
    method: Method,
    history: list[Message],
    sampling: Sampling,
    budget: int,
    stop: list[str],
) -> str:
    """Shows the answer while it comes, with its speed below; returns what came before Ctrl-C."""
    chunks = generate(
        model,
        method,
        [Prompt(id="chat", messages=tuple(history))],
        sampling=sampling,
        max_new_tokens=budget,
        stop=stop,
        stream=True,
    )
    text = ""
    status = ""
    # The live region shows the end of a long answer; all of it is printed once it is whole.
    with Live(console=console, transient=True, auto_refresh=False) as live:
        try:
            for text, status in _growing(chunks):
                live.update(Group(_tail(text, console), Text(status, style="dim")), refresh=True)
        except KeyboardInterrupt:
            status += ", interrupted"
    console.print(Text(text))
    console.print(Text(status, style="dim"))
    return text


def _growing(chunks: Iterator[Chunk]) -> Iterator[tuple[str, str]]:
    text, tokens = "", 0
    for chunk in chunks:
        text += chunk.text
        tokens += len(chunk.token_ids)
        speed = chunk.metrics.decode_tokens_per_second
        length = chunk.metrics.mean_acceptance_length
        drafts = "" if length is None else f", mean acceptance length {length:.2f}"
        yield text, f"{tokens} tokens, {speed:.1f} tokens/s{drafts}"


def _tail(text: str, console: Console) -> Text:
    lines = Text(text).wrap(console, console.width)
    return Text("\n").join(lines[-max(1, console.height - 2) :])
