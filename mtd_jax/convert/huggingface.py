"""Hugging Face model directories: safetensors, config.json, generation_config.json."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from jax.sharding import Mesh

from mtd_jax.config import ModelConfig
from mtd_jax.convert.assemble import (
    Piece,
    assemble,
    check_tensors,
    disassemble,
    plan,
    stored_dtype,
    stored_form,
)
from mtd_jax.convert.families import HF_TENSORS
from mtd_jax.convert.hf_config import config_from_hf, config_to_hf
from mtd_jax.convert.json_files import read_json
from mtd_jax.convert.safetensors_files import (
    INDEX_NAME,
    SINGLE_NAME,
    file_inside,
    write_safetensors,
)
from mtd_jax.convert.tensor_source import TensorSource
from mtd_jax.errors import InputError
from mtd_jax.parameters import size_in_bytes
from mtd_jax.progress import progress
from mtd_jax.tokenizer import TOKENIZER_FILES
from mtd_jax.transformer.model import Parameters

SHARD_BYTES = 5_000_000_000
"""Largest file that `write_huggingface` makes (transformers' own default)."""

# Buffers that old versions saved and that follow from the config.
_HARMLESS = re.compile(r".*\.(rotary_emb\.inv_freq|masked_bias|attention\.bias)")
_EMBEDDING, _HEAD = "model.embed_tokens.weight", "lm_head.weight"


def read_config(directory: Path) -> ModelConfig:
    """The model that config.json (and generation_config.json, if there) describes.

    Raises:
      InputError: see `hf_config.config_from_hf`.
    """
    generation = directory / "generation_config.json"
    return config_from_hf(
        read_json(directory / "config.json"),
        read_json(generation) if generation.is_file() else None,
    )


def read_parameters(
    config: ModelConfig,
    files: TensorSource,
    dtype: np.dtype | None = None,
    mesh: Mesh | None = None,
) -> Parameters:
    """The parameters in Hugging Face tensors, on the mesh's devices if there is one.

    Args:
      dtype: what to convert weights to; None keeps what is stored.

    Raises:
      InputError: missing, extra or wrongly shaped tensors (all are named), NaN, or values too
        large for `dtype`.
    """
    leaves = planned(config, files)
    if config.tie_embeddings and _HEAD in files.names():
        _check_tied(files)
    return assemble(config, files, leaves, dtype or stored_dtype(config, files, leaves), mesh)


def planned(config: ModelConfig, files: TensorSource) -> Mapping[str, tuple[Piece, ...]]:
    """For the path of every leaf of the model, the tensors that fill it, found to be there.

    Raises:
      InputError: missing, extra or wrongly shaped tensors (all are named).
    """
    leaves = plan(config, HF_TENSORS)
    check_tensors(config, files, leaves, is_harmless(config))
    return leaves


def is_harmless(config: ModelConfig) -> Callable[[str], bool]:
    """Says of a tensor's name whether the model loads without it, though it is there."""

    def check(name: str) -> bool:
        return bool(_HARMLESS.fullmatch(name)) or (config.tie_embeddings and name == _HEAD)

    return check


def write_huggingface(
    params: Parameters,
    out: Path,
    *,
    tokenizer_from: Path | None = None,
    shard_size: int = SHARD_BYTES,
) -> None:
    """Writes a directory that transformers loads: weights, configs, tokenizer files.

    Weights keep their dtype, bit for bit. Memory beside `params`: one tensor.

    Args:
      out: an existing directory.
      tokenizer_from: where to copy tokenizer files from.
      shard_size: most bytes of one file (one tensor more, if it alone is larger).
    """
    params = stored_form(params)
    config = params.config
    dtype = str(params.embedding.dtype)
    _write_json(out / "config.json", config_to_hf(config, dtype))
    tokens = {
        "bos_token_id": config.bos_token_id,
        "eos_token_id": list(config.eos_token_ids) or None,
        "pad_token_id": config.pad_token_id,
    }
    _write_json(out / "generation_config.json", {k: v for k, v in tokens.items() if v is not None})
    if tokenizer_from is not None:
        copy_tokenizer(tokenizer_from, out)
    _write_shards(config, params, out, shard_size)


def copy_tokenizer(source: Path, out: Path) -> None:
    """Copies the tokenizer files that a directory has.

    Raises:
      InputError: one of them is a link that leads elsewhere, or no regular file.
    """
    for name in TOKENIZER_FILES:
        if os.path.lexists(source / name):
            shutil.copyfile(file_inside(source, name), out / name)


def _write_shards(config: ModelConfig, params: Parameters, out: Path, shard_size: int) -> None:
    leaves = plan(config, HF_TENSORS)
    total = size_in_bytes(params)
    weight_map: dict[str, str] = {}
    files: list[Path] = []
    names = sum(1 for _ in disassemble(config, params, leaves))
    with progress("writing weights", names) as shown:
        for shard in _shards(disassemble(config, params, leaves), shard_size):
            file = out / f"model-{len(files) + 1:05d}.safetensors"
            write_safetensors(file, shard, shown.advance)
            weight_map |= {name: file.name for name, _ in shard}
            files.append(file)
    if len(files) == 1:
        files[0].rename(out / SINGLE_NAME)
        return
    # How many there are is known now only; names are those that transformers writes.
    renamed = {
        f.name: f"model-{i + 1:05d}-of-{len(files):05d}.safetensors" for i, f in enumerate(files)
    }
    for file in files:
        file.rename(out / renamed[file.name])
    index = {
        "metadata": {"total_size": total},
        "weight_map": {name: renamed[file] for name, file in sorted(weight_map.items())},
    }
    _write_json(out / INDEX_NAME, index)


def _shards(
    tensors: Iterator[tuple[str, np.ndarray]], shard_size: int
) -> Iterator[list[tuple[str, np.ndarray]]]:
    shard: list[tuple[str, np.ndarray]] = []
    size = 0
    for name, values in tensors:
        if shard and size + values.nbytes > shard_size:
            yield shard
            shard, size = [], 0
        shard.append((name, values))
        size += values.nbytes
    if shard:
        yield shard


def _check_tied(files: TensorSource) -> None:
    """A stored head beside tied embeddings must be the embedding: otherwise, which one counts?"""
    whole = tuple(slice(0, size) for size in files.shape(_EMBEDDING))
    if files.shape(_HEAD) == files.shape(_EMBEDDING):
        embedding = np.array(files.read(_EMBEDDING, whole))
        if np.array_equal(embedding, files.read(_HEAD, whole)):
            return
    raise InputError(
        f"{files.place(_HEAD)}: '{_HEAD}' differs from '{_EMBEDDING}', "
        "but the config says that they are tied"
    )


def _write_json(path: Path, values: dict[str, Any]) -> None:
    path.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
