"""Decoding speed of a model's shape with random weights, against the memory bandwidth.

    python benchmarks/shapes.py configs/models/qwen3-4b.toml --dtype bfloat16 --out results.json
    python benchmarks/shapes.py configs/models/qwen3-4b.toml --dtype bfloat16 --prompt-tokens 1024 \
        --new-tokens 1024 --methods ar,dmtd:cycle=2,dmtd:cycle=3,dmtd:cycle=4

The speed of plain decoding and of cycles does not depend on what the weights say, so a shape is
enough to measure a machine. Runs from the source tree, on CPU, GPU or TPU.
"""

from __future__ import annotations

import argparse
import functools
import json
from pathlib import Path

import jax
import jax.numpy as jnp

from mtd_jax import load, methods, parameters
from mtd_jax.config import ModelConfig, read_shape
from mtd_jax.decoding.language_model import LanguageModel
from mtd_jax.decoding.method import Method
from mtd_jax.evaluation import environment
from mtd_jax.evaluation.bench import bench, to_json
from mtd_jax.transformer import model


def random_model(config: ModelConfig, dtype: str, name: str) -> LanguageModel:
    """Weights made on the device, in the layout that decodes there."""
    make = functools.partial(parameters.initialize, model.declare(config), dtype=jnp.dtype(dtype))
    params = jax.jit(make)(jax.random.key(0))
    return LanguageModel(
        params=model.prepare_for_decoding(params),
        tokenizer=None,
        mesh=None,
        fingerprint="random",
        source=f"random weights, shape {name}",
    )


def whole_numbers(text: str) -> list[int]:
    """`1,4` as a list."""
    try:
        return [int(number) for number in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(f"'{text}' is no list of whole numbers") from None


def numbers(text: str) -> list[float]:
    """`0,0.1` as a list."""
    try:
        return [float(number) for number in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(f"'{text}' is no list of numbers") from None


def add_model_arguments(parser: argparse.ArgumentParser) -> None:
    """--model or --config, and --dtype."""
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--model", type=Path, help="a checkpoint")
    source.add_argument("--config", type=Path, help="or a shape, with random weights")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])


def given_model(args: argparse.Namespace) -> tuple[LanguageModel, str]:
    """What `add_model_arguments` asks for, and its name."""
    if args.model is not None:
        return load(args.model, dtype=args.dtype), args.model.name
    name = args.config.stem
    return random_model(read_shape(args.config), args.dtype, name), name


def _method(label: str, _: int) -> Method:
    """Of `dmtd:cycle=2`, say; the same for every batch size."""
    name, *options = label.split(":")
    return methods.make_method(name, dict(option.split("=", 1) for option in options))


def main() -> None:
    """Measures and prints one shape."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("config", type=Path)
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--prompt-tokens", type=int, default=128)
    parser.add_argument("--new-tokens", type=int, default=128)
    parser.add_argument("--batch-sizes", type=whole_numbers, default=[1], metavar="B,B,...")
    parser.add_argument("--methods", default="ar", metavar="M,M,...", help="as for `mtd bench`")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    config = read_shape(args.config)
    loaded = random_model(config, args.dtype, args.config.stem)
    result = bench(
        loaded,
        {label: functools.partial(_method, label) for label in args.methods.split(",")},
        [[7] * args.prompt_tokens] * max(args.batch_sizes),
        batch_sizes=args.batch_sizes,
        max_new_tokens=args.new_tokens,
        ignore_eos=True,
        repeats=args.repeats,
    )
    report = {
        "hardware": environment.hardware(),
        "versions": environment.versions(),
        **environment.provenance(),
        "shape": args.config.stem,
        "dtype": args.dtype,
        "parameters": parameters.count(model.declare(config)),
        "prompt_tokens": args.prompt_tokens,
        **to_json(result),
    }
    print(json.dumps(report, indent=2))
    if args.out is not None:
        args.out.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
