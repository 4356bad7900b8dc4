"""`mtd generate`: answers prompts."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator

from mtd_jax.cli import arguments
from mtd_jax.cli.session import open_method, open_model, sampling_of, typical_length
from mtd_jax.decoding.generate import Chunk, Completion, collect, generate
from mtd_jax.decoding.method import Method
from mtd_jax.decoding.metrics import Metrics, total
from mtd_jax.decoding.requests import DEFAULT_NEW_TOKENS, Prompt, read_prompts
from mtd_jax.errors import InputError
from mtd_jax.evaluation.roofline import memory_bandwidth
from mtd_jax.progress import progress

_DESCRIPTION = """\
Answer one prompt or a file of prompts.

  mtd generate --model models/smollm2 --prompt "Why is the sky blue?" --stream
  mtd generate --model models/smollm2 --prompts prompts.jsonl --batch-size 4 --json

A prompts file holds one JSON object a line: {"id": ..., "prompt": TEXT}, or "messages": [{"role",
"content"}, ...] or "token_ids": [...] in place of "prompt"; optional "max_new_tokens" and "seed",
which go before the flags.
Text is wrapped in the model's chat template where it has one (--no-chat: taken as it is).
"""


def add_parser(commands: arguments.Subparsers) -> None:
    """Declares the command."""
    parser = commands.add_parser("generate", help="answer prompts", description=_DESCRIPTION)
    arguments.add_model_arguments(parser)
    arguments.add_method_arguments(parser)
    source = parser.add_argument_group("prompts")
    source.add_argument(
        "--prompt", action="append", metavar="TEXT", help="a prompt; several times: several prompts"
    )
    source.add_argument("--prompts", metavar="FILE.jsonl", help="a file of prompts")
    source.add_argument(
        "--chat",
        action=argparse.BooleanOptionalAction,
        help="wrap text in the chat template (default: if there is one)",
    )
    source.add_argument(
        "--batch-size", type=int, default=1, metavar="B", help="decoded together (default: 1)"
    )
    arguments.add_sampling_arguments(parser)
    output = parser.add_argument_group("output")
    output.add_argument("--stream", action="store_true", help="show text as it comes")
    output.add_argument("--json", action="store_true", help="print one JSON object")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Runs the command."""
    if (args.prompt is None) == (args.prompts is None):
        raise InputError("give one of --prompt and --prompts")
    if args.stream and args.json:
        raise InputError("give one of --stream and --json")
    if args.stream and args.batch_size > 1:
        raise InputError("--stream shows one answer at a time: leave out --batch-size")
    sampling = sampling_of(args)
    choice = open_method(args)
    given = [Prompt(id=str(i), text=text) for i, text in enumerate(args.prompt or ())]
    prompts = given or read_prompts(args.prompts)
    model = open_model(args)
    length = typical_length(model, prompts, args.chat)
    method = choice.fitted(model, batch_size=args.batch_size, prompt_tokens=length)
    budget = DEFAULT_NEW_TOKENS if args.max_new_tokens is None else args.max_new_tokens
    chunks = generate(
        model,
        method,
        prompts,
        sampling=sampling,
        max_new_tokens=budget,
        stop=args.stop,
        chat=args.chat,
        batch_size=args.batch_size,
        stream=True,
    )
    if args.stream:
        chunks = _shown(chunks, prompts)
    completions = collect(_with_progress(chunks, prompts, args), len(prompts))
    metrics = total([c.metrics for c in completions], args.batch_size)
    if args.json:
        report = _report(args, method, completions, metrics)
        print(json.dumps(report, ensure_ascii=False))
        return 0
    if not args.stream:
        for completion in completions:
            if len(prompts) > 1:
                print(f"--- {completion.id}")
            print(completion.text)
    print(_summary(metrics, method), file=sys.stderr)
    return 0


def _shown(chunks: Iterator[Chunk], prompts: list[Prompt]) -> Iterator[Chunk]:
    """Prints the chunks as they pass."""
    started: set[int] = set()
    for chunk in chunks:
        if len(prompts) > 1 and chunk.index not in started:
            print(f"--- {chunk.id}")
        started.add(chunk.index)
        print(chunk.text, end="\n" if chunk.finish_reason else "", flush=True)
        yield chunk


def _with_progress(
    chunks: Iterator[Chunk], prompts: list[Prompt], args: argparse.Namespace
) -> Iterator[Chunk]:
    """Shows how many prompts are answered, where their texts are not shown themselves."""
    if args.stream:
        yield from chunks
        return
    tokens = 0
    with progress("answering prompts", len(prompts)) as shown:
        for chunk in chunks:
            tokens += len(chunk.token_ids)
            shown.advance(int(chunk.finish_reason is not None), note=f"{tokens} tokens")
            yield chunk


def _report(
    args: argparse.Namespace, method: Method, completions: list[Completion], metrics: Metrics
) -> dict[str, object]:
    bandwidth = memory_bandwidth()
    outputs = [
        {
            "id": c.id,
            "text": c.text,
            "token_ids": list(c.token_ids),
            "prompt_tokens": c.prompt_tokens,
            "finish_reason": c.finish_reason,
            "metrics": c.metrics.to_dict(bandwidth),
        }
        for c in completions
    ]
    return {
        "model": args.model,
        "method": args.method,
        "lossless": method.lossless,
        "outputs": outputs,
        "metrics": metrics.to_dict(bandwidth),
    }


def _summary(metrics: Metrics, method: Method) -> str:
    length = metrics.mean_acceptance_length
    drafts = "" if length is None else f"mean acceptance length {length:.2f}; "
    lossy = "" if method.lossless else "LOSSY acceptance; "
    return (
        f"[{metrics.tokens} tokens in {metrics.seconds:.2f} s: "
        f"{metrics.tokens_per_second:.1f} tokens/s, prompt {metrics.prompt_seconds:.2f} s; "
        f"{drafts}{lossy}compilation {metrics.compile_seconds:.1f} s apart]"
    )
