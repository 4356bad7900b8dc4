"""Whole conversions, from a path to a path."""

from __future__ import annotations

from pathlib import Path

import jax

from mtd_jax.convert import native
from mtd_jax.convert.assemble import stored_form
from mtd_jax.convert.atomic import atomic_directory, check_free, check_space, shared_directory
from mtd_jax.convert.huggingface import SHARD_BYTES, copy_tokenizer, write_huggingface
from mtd_jax.convert.load import load_as_stored, locate
from mtd_jax.decoding.language_model import LanguageModel
from mtd_jax.errors import InputError
from mtd_jax.parameters import size_in_bytes


def to_native(
    source: Path, out: Path, *, dtype: str | None = None, note: str = "", force: bool = False
) -> LanguageModel:
    """Converts anything that `load` takes to a native checkpoint, and returns the model.

    Args:
      dtype: float type of the result; None keeps the stored one.
      note: added to what the checkpoint says of its source.
      force: replace a checkpoint at `out`.

    Raises:
      InputError: the source cannot be read, or `out` cannot be written.
    """
    kind, place = locate(source)
    _check_apart(place, out)
    check_free(out, force=force)
    model = load_as_stored(source, dtype=dtype)
    with atomic_directory(out, force=force) as work:
        check_space(work, size_in_bytes(model.params))
        if kind == "gguf":
            if model.tokenizer is not None:
                model.tokenizer.save(work)
        else:
            copy_tokenizer(place, work)
        said = f"{model.source}; {note}" if note else model.source
        native.write_native(work, model.params, fingerprint=model.fingerprint, source=said)
    return model


def to_huggingface(
    source: Path, out: Path, *, shard_size: int = SHARD_BYTES, force: bool = False
) -> LanguageModel:
    """Converts anything that `load` takes to a Hugging Face directory, and returns the model.

    Raises:
      InputError: the source cannot be read, or `out` cannot be written.
    """
    kind, place = locate(source)
    _check_apart(place, out)
    check_free(out, force=force)
    model = load_as_stored(source)
    with atomic_directory(out, force=force) as work:
        check_space(work, size_in_bytes(model.params))
        if kind == "gguf" and model.tokenizer is not None:
            model.tokenizer.save(work)
        tokenizer_from = None if kind == "gguf" else place
        write_huggingface(model.params, work, tokenizer_from=tokenizer_from, shard_size=shard_size)
    return model


def save_native(model: LanguageModel, out: Path, *, force: bool = False) -> None:
    """Writes a loaded or trained model as a native checkpoint.

    Of several processes all must call it; they write their parts into one directory, which must be
    on a disk that all of them see.

    Raises:
      InputError: `out` is there already or cannot be written.
    """
    with shared_directory(out, force=force) as work:
        check_space(work, size_in_bytes(model.params))
        if model.tokenizer is not None and jax.process_index() == 0:
            model.tokenizer.save(work)
        params = stored_form(model.params)
        native.write_native(work, params, fingerprint=model.fingerprint, source=model.source)


def _check_apart(source: Path, out: Path) -> None:
    source, out = source.resolve(), out.resolve()
    if source == out or source.is_relative_to(out) or out.is_relative_to(source):
        raise InputError(f"{out} and {source} lie in each other: give another place to write to")
