"""The native checkpoint: a directory with config.json, params/ (Orbax) and the tokenizer."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from mtd_jax.config import ModelConfig
from mtd_jax.convert.assemble import leaf_paths, leaf_shardings
from mtd_jax.convert.families import FAMILIES
from mtd_jax.convert.inventory import check_inventory, take_inventory
from mtd_jax.convert.json_files import read_json
from mtd_jax.convert.orbax_tree import restore_tree, save_tree
from mtd_jax.convert.tensor_source import FLOATS
from mtd_jax.errors import InputError, unknown_name
from mtd_jax.transformer.model import Parameters, declare

FORMAT, VERSION = "mtd-jax", 1
_PARAMS = "params"


@dataclasses.dataclass(frozen=True)
class NativeInfo:
    """What a native config.json says beside the weights."""

    config: ModelConfig
    dtype: str
    """Name of the float type in which weights are stored."""
    fingerprint: str
    source: str
    """Where the weights came from and what was done to them, in words."""
    files: Any
    """The inventory of params/."""


def is_native(directory: Path) -> bool:
    """Whether a directory's config.json is one of ours."""
    config = directory / "config.json"
    return config.is_file() and read_json(config).get("format") == FORMAT


def write_native(directory: Path, params: Parameters, *, fingerprint: str, source: str) -> None:
    """Writes config.json and params/ into an existing directory (no tokenizer).

    Raises:
      OSError: the disk is full, or another failure to write.
    """
    config = params.config
    save_tree(directory / _PARAMS, dict(leaf_paths(params)))
    if jax.process_index() != 0:
        return  # of several processes each wrote its part of the weights; one writes the rest
    values = {
        "format": FORMAT,
        "version": VERSION,
        "model_type": config.family,
        "dtype": str(params.embedding.dtype),
        "source": source,
        "fingerprint": fingerprint,
        "model": config.to_dict(),
        "files": take_inventory(directory / _PARAMS),
    }
    text = json.dumps(values, indent=2) + "\n"
    (directory / "config.json").write_text(text, encoding="utf-8")


def read_info(directory: Path) -> NativeInfo:
    """What config.json says.

    Raises:
      InputError: it is not a native config, of a version not known here, or malformed.
    """
    values = read_json(directory / "config.json")
    if values.get("format") != FORMAT:
        raise InputError(f"{directory} is no native checkpoint")
    if values.get("version") != VERSION:
        raise InputError(
            f"{directory}: checkpoint version {values.get('version')!r}, "
            f"but this program reads version {VERSION}"
        )
    model = values.get("model")
    if not isinstance(model, dict):
        raise InputError(f"{directory}/config.json has no 'model' object")
    texts: dict[str, str] = {}
    for key in ("dtype", "fingerprint", "source"):
        text = values.get(key)
        if not isinstance(text, str):
            raise InputError(f"{directory}/config.json: '{key}' must be text")
        texts[key] = text
    if texts["dtype"] not in FLOATS:
        raise unknown_name("dtype", texts["dtype"][:60], FLOATS)
    config = ModelConfig.from_dict(model)
    if config.family not in FAMILIES:
        raise unknown_name("model family", config.family[:60], FAMILIES)
    return NativeInfo(config=config, files=values.get("files"), **texts)


def check_files(directory: Path, info: NativeInfo) -> None:
    """Looks whether the files of the weights are there and as long as they were.

    Raises:
      InputError: names the first that is missing or was changed.
    """
    check_inventory(directory / _PARAMS, info.files)


def read_native(
    directory: Path, info: NativeInfo, dtype: np.dtype | None = None, mesh: Mesh | None = None
) -> Parameters:
    """The parameters, each leaf restored onto the devices where it belongs.

    Raises:
      InputError: weights are missing, of another shape than the config says, or unreadable.
    """
    check_files(directory, info)
    declared = declare(info.config)
    dtype = FLOATS[info.dtype] if dtype is None else dtype
    wanted = {
        path: jax.ShapeDtypeStruct(weight.shape, dtype, sharding=sharding)
        for (path, weight), sharding in zip(
            leaf_paths(declared), leaf_shardings(declared, mesh), strict=True
        )
    }
    restored = restore_tree(directory / _PARAMS, wanted)
    damaged = [path for path, leaf in restored.items() if not jnp.isfinite(leaf).all()]
    if damaged:
        raise InputError(f"{directory} holds NaN or infinite weights: {', '.join(damaged)}")
    return jax.tree.unflatten(jax.tree.structure(declared), [restored[path] for path in wanted])
