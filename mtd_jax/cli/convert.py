"""`mtd convert`: checkpoints in and out."""

from __future__ import annotations

import argparse
import contextlib
from pathlib import Path

from mtd_jax.cli.arguments import Subparsers

_FROM = """\
Reads a Hugging Face directory (safetensors), a GGUF file or a native checkpoint and writes a
native one: config.json, params/ and the tokenizer. Nothing appears at OUT before it is whole.

example:
  mtd convert from-hf ~/models/Llama-3.2-1B-Instruct models/llama-1b --dtype bfloat16
"""
_TO = """\
Writes a directory that transformers loads: config.json, safetensors, the tokenizer. Weights keep
their dtype, bit for bit.

example:
  mtd convert to-hf models/llama-1b exported/llama-1b
"""
_FROM_MEDUSA = """\
Reads published Medusa heads (safetensors, in the layout of the original repository or of vLLM) and
writes a directory for --heads. Accuracies are not among them: --option tree=... or `auto`.

example:
  mtd convert from-medusa medusa-vicuna-7b heads/vicuna --model models/vicuna-7b
"""
_TO_MEDUSA = """\
Writes Medusa heads as the original repository or vLLM reads them, each with an output matrix.

example:
  mtd convert to-medusa runs/medusa/heads exported/medusa --model models/smollm2 --layout vllm
"""


def add_parser(subparsers: Subparsers) -> None:
    """Adds `convert` with a direction for each format."""
    parser = subparsers.add_parser(
        "convert",
        help="bring weights in and out",
        description="Converts checkpoints and heads from and to the formats of others.",
    )
    kinds = parser.add_subparsers(dest="direction", required=True, metavar="DIRECTION")
    from_hf = kinds.add_parser(
        "from-hf",
        help="Hugging Face directory or GGUF file -> native checkpoint",
        description=_FROM,
    )
    from_hf.add_argument(
        "--dtype", choices=["bfloat16", "float32"], help="float type to store (default: as it is)"
    )
    to_hf = kinds.add_parser(
        "to-hf",
        help="native checkpoint -> Hugging Face directory",
        description=_TO,
    )
    to_hf.add_argument(
        "--shard-size",
        type=_gigabytes,
        default=5.0,
        metavar="GB",
        help="largest file, in 10^9 bytes (default: 5)",
    )
    from_medusa = kinds.add_parser(
        "from-medusa", help="published Medusa heads -> heads of a model", description=_FROM_MEDUSA
    )
    to_medusa = kinds.add_parser(
        "to-medusa", help="heads of a model -> published layouts", description=_TO_MEDUSA
    )
    to_medusa.add_argument(
        "--layout", choices=["original", "vllm"], default="original", help="default: original"
    )
    for direction in (from_medusa, to_medusa):
        direction.add_argument(
            "--model", required=True, metavar="PATH", help="the model that the heads are for"
        )
    directions = (
        (from_hf, _from_hf),
        (to_hf, _to_hf),
        (from_medusa, _from_medusa),
        (to_medusa, _to_medusa),
    )
    for direction, run in directions:
        direction.add_argument("source", metavar="SRC", type=Path, help="what to read")
        direction.add_argument("out", metavar="OUT", type=Path, help="directory to make")
        direction.add_argument(
            "--force", action="store_true", help="replace a checkpoint that is at OUT already"
        )
        direction.set_defaults(run=run)


def _from_hf(args: argparse.Namespace) -> int:
    from mtd_jax.convert.conversions import to_native

    model = to_native(args.source, args.out, dtype=args.dtype, force=args.force)
    print(f"{args.out}: {model.config.family}, {model.params.embedding.dtype}, {model.fingerprint}")
    return 0


def _to_hf(args: argparse.Namespace) -> int:
    from mtd_jax.convert.conversions import to_huggingface

    size = int(args.shard_size * 1e9)
    model = to_huggingface(args.source, args.out, shard_size=size, force=args.force)
    print(f"{args.out}: {model.config.family}, {model.params.embedding.dtype}")
    return 0


def _from_medusa(args: argparse.Namespace) -> int:
    from mtd_jax.convert.heads import save_heads
    from mtd_jax.convert.load import load_as_stored
    from mtd_jax.convert.medusa_files import read_medusa

    heads = read_medusa(args.source, load_as_stored(args.model))
    save_heads(heads, args.out, force=args.force)
    print(f"{args.out}: {heads.options['count']} heads for {heads.base}")
    return 0


def _to_medusa(args: argparse.Namespace) -> int:
    from mtd_jax.convert.heads import stored_heads
    from mtd_jax.convert.load import load_as_stored
    from mtd_jax.convert.medusa_files import write_medusa

    base = load_as_stored(args.model)
    write_medusa(stored_heads(args.source, base), base, args.out, args.layout, force=args.force)
    print(f"{args.out}: {args.layout} layout")
    return 0


def _gigabytes(text: str) -> float:
    with contextlib.suppress(ValueError):
        if 0 < float(text) < 1e6:
            return float(text)
    raise argparse.ArgumentTypeError(f"takes 10^9 bytes as a number, 0.1 or 5, got '{text[:40]}'")
