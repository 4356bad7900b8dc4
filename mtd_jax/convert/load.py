"""One door for models on disk: native checkpoints, Hugging Face directories, GGUF files."""

from __future__ import annotations

import contextlib
import dataclasses
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from mtd_jax.config import ModelConfig
from mtd_jax.convert import gguf, huggingface, native
from mtd_jax.convert.fingerprint import fingerprint
from mtd_jax.convert.safetensors_files import open_safetensors, refuse_pickles
from mtd_jax.convert.tensor_source import FLOATS
from mtd_jax.decoding.language_model import LanguageModel
from mtd_jax.errors import InputError, nearest, unknown_name
from mtd_jax.tokenizer import Tokenizer, has_tokenizer
from mtd_jax.transformer.model import prepare_for_decoding


def load(
    path: str | os.PathLike[str], *, dtype: str | None = None, mesh: Mesh | None = None
) -> LanguageModel:
    """A model with its tokenizer, if it has one.

    Args:
      path: a native checkpoint, a Hugging Face directory, a GGUF file, or a directory with one.
      dtype: `float32`, `bfloat16` or `float16`; None keeps what is stored, except that 16-bit
        weights become float32 on CPU (their products run ten times slower there in jax 0.10).
      mesh: puts the weights on its devices; None: on the first device.

    Raises:
      InputError: nothing there that can be loaded, or it is damaged.
    """
    if dtype is not None and dtype not in FLOATS:
        raise unknown_name("dtype", str(dtype), FLOATS)
    if dtype is None and jax.default_backend() == "cpu":
        dtype = "float32"
    model = load_as_stored(path, dtype=dtype, mesh=mesh)
    if mesh is not None:
        return model
    return dataclasses.replace(model, params=prepare_for_decoding(model.params))


def load_as_stored(
    path: str | os.PathLike[str],
    *,
    dtype: str | None = None,
    mesh: Mesh | None = None,
    reading: Callable[[], contextlib.AbstractContextManager[Any]] = contextlib.nullcontext,
) -> LanguageModel:
    """`load`, but without `dtype` weights stay as they are stored on every backend.

    Args:
      reading: entered while this process reads files; what all processes compute together of the
        weights, as their fingerprint, comes behind it.
    """
    kind, place = locate(Path(path))
    wanted = None if dtype is None else FLOATS[dtype]
    if kind == "native":
        return _load_native(place, wanted, mesh)
    with reading():
        if kind == "gguf":
            opened = gguf.open_gguf(place)
            params, source = gguf.read_parameters(opened, wanted, mesh), opened.source
            tokenizer = gguf.read_tokenizer(opened)
        else:
            config, files = huggingface.read_config(place), open_safetensors(place)
            params = huggingface.read_parameters(config, files, wanted, mesh)
            source = f"Hugging Face checkpoint {place.resolve().name}"
            tokenizer = _tokenizer(place)
    return LanguageModel(
        params=params,
        tokenizer=tokenizer,
        mesh=mesh,
        fingerprint=fingerprint(params),
        source=source,
    )


def read_description(path: str | os.PathLike[str]) -> tuple[ModelConfig, Tokenizer | None]:
    """Config and tokenizer of what `load` would load, without its weights.

    Raises:
      InputError: as for `load`.
    """
    kind, place = locate(Path(path))
    if kind == "native":
        return native.read_info(place).config, _tokenizer(place)
    if kind == "gguf":
        opened = gguf.open_gguf(place)
        return gguf.read_config(opened), gguf.read_tokenizer(opened)
    return huggingface.read_config(place), _tokenizer(place)


def check_weights(path: str | os.PathLike[str]) -> str | None:
    """What `load` finds out about the files of the weights before it reads values.

    Returns:
      The fingerprint, where it is written down.

    Raises:
      InputError: as for `load`.
    """
    kind, place = locate(Path(path))
    if kind == "native":
        info = native.read_info(place)
        native.check_files(place, info)
        return info.fingerprint
    elif kind == "gguf":
        opened = gguf.open_gguf(place)
        gguf.planned(gguf.read_config(opened), opened)
    else:
        huggingface.planned(huggingface.read_config(place), open_safetensors(place))
    return None


def locate(path: Path) -> tuple[str, Path]:
    """What lies at a path: `native`, `huggingface` or `gguf`, and its directory or file.

    Raises:
      InputError: no such path (a similar one is named), or nothing there that is known.
    """
    if not path.exists():
        siblings = [p.name for p in path.parent.iterdir()] if path.parent.is_dir() else []
        raise InputError(f"no such file or directory: {path}{nearest(path.name, siblings)}")
    if path.is_file():
        refuse_pickles(path)
        if path.suffix != ".gguf":
            raise InputError(f"{path} is no .gguf file; give the directory of other checkpoints")
        return "gguf", path
    if (path / "config.json").is_file():
        return ("native" if native.is_native(path) else "huggingface"), path
    ggufs = sorted(path.glob("*.gguf"))
    if len(ggufs) > 1:
        raise InputError(f"{path} holds {len(ggufs)} .gguf files: name one of them")
    if ggufs:
        return "gguf", ggufs[0]
    refuse_pickles(path)
    raise InputError(f"{path} holds neither a config.json nor a .gguf file")


def _load_native(directory: Path, dtype: np.dtype | None, mesh: Mesh | None) -> LanguageModel:
    info = native.read_info(directory)
    return LanguageModel(
        params=native.read_native(directory, info, dtype, mesh),
        tokenizer=_tokenizer(directory),
        mesh=mesh,
        fingerprint=info.fingerprint,
        source=info.source,
    )


def _tokenizer(directory: Path) -> Tokenizer | None:
    return Tokenizer.load(directory) if has_tokenizer(directory) else None
