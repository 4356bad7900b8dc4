"""What a command does before it decodes: cache for compiled programs, model, method, sampling."""

from __future__ import annotations

import argparse
import os
from pathlib import Path

import jax

from mtd_jax import methods, sharding
from mtd_jax.cli.arguments import existing_path, parse_options
from mtd_jax.convert.load import load
from mtd_jax.decoding.language_model import LanguageModel
from mtd_jax.decoding.method import Method
from mtd_jax.decoding.sampling import Sampling
from mtd_jax.errors import InputError


def use_compilation_cache() -> None:
    """Keeps compiled programs on disk, so that only the first run of a shape compiles.

    In `$MTD_CACHE_DIR`, else `$XDG_CACHE_HOME/mtd-jax`, else `~/.cache/mtd-jax`.
    """
    home = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    directory = os.environ.get("MTD_CACHE_DIR") or str(Path(home) / "mtd-jax")
    jax.config.update("jax_compilation_cache_dir", str(Path(directory) / "xla"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)


def open_model(args: argparse.Namespace) -> LanguageModel:
    """The model of --model, --dtype and --mesh."""
    use_compilation_cache()
    path = existing_path(args.model, "model")
    mesh = sharding.make_mesh(sharding.parse_mesh(args.mesh)) if args.mesh is not None else None
    return load(path, dtype=args.dtype, mesh=mesh)


def open_method(args: argparse.Namespace) -> Method:
    """The method of --method, --heads and --option."""
    if args.heads is not None:
        existing_path(args.heads, "heads")
        raise InputError(f"method '{args.method}' has no heads: leave out --heads")
    return methods.make_method(args.method, parse_options(args.option))


def sampling_of(args: argparse.Namespace) -> Sampling:
    """The sampling flags, checked."""
    return Sampling(
        temperature=args.temperature,
        top_k=args.top_k,
        top_p=args.top_p,
        min_p=args.min_p,
        seed=args.seed,
    )
