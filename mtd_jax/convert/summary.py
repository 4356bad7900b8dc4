"""What a checkpoint is, read without its weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mtd_jax import parameters
from mtd_jax.config import ModelConfig
from mtd_jax.convert import gguf, huggingface, native
from mtd_jax.convert.assemble import check_tensors, leaf_paths, plan, stored_dtype
from mtd_jax.convert.families import HF_TENSORS
from mtd_jax.convert.heads import describe_heads
from mtd_jax.convert.json_files import read_json
from mtd_jax.convert.load import load_as_stored, locate
from mtd_jax.convert.method_files import FILE
from mtd_jax.convert.safetensors_files import open_safetensors
from mtd_jax.convert.tensor_source import FLOATS
from mtd_jax.tokenizer import has_tokenizer
from mtd_jax.transformer.model import declare


def summarize(path: Path, *, with_fingerprint: bool = False) -> dict[str, Any]:
    """A JSON-ready description of anything that `load` or `load_heads` takes.

    Args:
      with_fingerprint: read all weights to compute it where it is not stored.

    Raises:
      InputError: nothing there that can be loaded, or it is damaged.
    """
    if (path / FILE).is_file() and not (path / "config.json").is_file():
        return describe_heads(path)
    kind, place = locate(path)
    fingerprint: str | None = None
    if kind == "native":
        info = native.read_info(place)
        config, dtype, source = info.config, info.dtype, info.source
        fingerprint = info.fingerprint
        tokenizer = has_tokenizer(place)
    elif kind == "gguf":
        file = gguf.open_gguf(place)
        config, dtype, source = gguf.read_config(file), file.common_type, file.source
        tokenizer = "tokenizer.ggml.model" in file.metadata
    else:
        config = huggingface.read_config(place)
        dtype = _huggingface_dtype(place, config)
        source = f"Hugging Face checkpoint {place.resolve().name}"
        tokenizer = has_tokenizer(place)
    if fingerprint is None and with_fingerprint:
        fingerprint = load_as_stored(path).fingerprint
    declared = declare(config)
    number = parameters.count(declared)
    return {
        "path": str(path),
        "format": kind,
        "family": config.family,
        "parameters": number,
        "dtype": dtype,
        "bytes": _size(place, kind) or number * FLOATS[dtype].itemsize,
        "context": config.context_length,
        "rope": config.to_dict()["rope"],
        "tokenizer": tokenizer,
        "source": source,
        "fingerprint": fingerprint,
        "method": _method(path),
        "model": config.to_dict(),
        "shapes": {name: list(weight.shape) for name, weight in leaf_paths(declared)},
    }


def _huggingface_dtype(directory: Path, config: ModelConfig) -> str:
    files = open_safetensors(directory)
    leaves = plan(config, HF_TENSORS)
    check_tensors(config, files, leaves, huggingface.is_harmless(config))
    return stored_dtype(config, files, leaves).name


def _size(place: Path, kind: str) -> int | None:
    return place.stat().st_size if kind == "gguf" else None


def _method(path: Path) -> dict[str, Any] | None:
    method = path / "method.json"
    return read_json(method) if method.is_file() else None
