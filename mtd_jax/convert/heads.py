"""Heads on disk: `DIR/method.json` and `DIR/heads/` (Orbax), and those that come with the package.

`method.json` says the method, its options, the fingerprint of the base, the files of `heads/` and
the record (`method_files`).
"""

from __future__ import annotations

import importlib.resources
import math
import os
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from mtd_jax import methods, parameters
from mtd_jax.config import ModelConfig
from mtd_jax.convert.assemble import leaf_paths, leaf_shardings
from mtd_jax.convert.atomic import check_space, shared_directory
from mtd_jax.convert.inventory import check_inventory, take_inventory
from mtd_jax.convert.method_files import FILE, MethodFile, read_method, write_method
from mtd_jax.convert.orbax_tree import restore_tree, save_tree, stored_shapes
from mtd_jax.convert.tensor_source import FLOATS
from mtd_jax.decoding.draft_vocabulary import VOCABULARY, DraftVocabulary
from mtd_jax.decoding.heads import ACCURACIES, Heads, accuracies_of
from mtd_jax.decoding.language_model import LanguageModel
from mtd_jax.errors import InputError, unknown_name
from mtd_jax.typing import DTypeLike

_WEIGHTS = "heads"


def load_heads(path: str | os.PathLike[str], model: LanguageModel) -> Heads:
    """Trained heads for a model, in its float type and on its devices.

    Raises:
      InputError: nothing there, heads of another base, or damaged ones.
    """
    return _loaded(Path(path), model, model.params.embedding.dtype)


def stored_heads(path: str | os.PathLike[str], model: LanguageModel) -> Heads:
    """`load_heads`, but in the float type that they are stored in."""
    return _loaded(Path(path), model, None)


def _loaded(directory: Path, model: LanguageModel, dtype: DTypeLike | None) -> Heads:
    if not directory.is_dir():
        raise InputError(f"no heads at {directory}")
    file = read_method(directory)
    file.check_base(model.fingerprint, directory)
    weights = read_weights(directory, file, model.config, dtype, mesh=model.mesh)
    vocabulary = None
    if methods.make_spec(file.method, file.options).vocabulary:
        vocabulary = DraftVocabulary.of(model.params, file.record.get(VOCABULARY))
    return Heads(file.method, file.options, file.base, weights, file.record, vocabulary)


def shipped_heads(method: str, model: LanguageModel) -> Path | None:
    """The directory of the package's own heads for a method and a model; None: there are none."""
    found = importlib.resources.files("mtd_jax").joinpath(_WEIGHTS)
    if not isinstance(found, Path) or not found.is_dir():
        return None
    for directory in sorted(found.iterdir()):
        if (directory / FILE).is_file():
            file = read_method(directory)
            if file.method == method and file.base == model.fingerprint:
                return directory
    return None


def save_heads(
    heads: Heads, out: Path, *, dtype: DTypeLike | None = None, force: bool = False
) -> None:
    """Writes heads so that they appear whole or not at all.

    Of several processes all must call it, on a disk that all of them see.

    Args:
      dtype: float type to store; None keeps what they have.
      force: replace what an earlier call wrote at `out`.

    Raises:
      InputError: `out` is there already or cannot be written.
    """
    weights = heads.weights
    if dtype is not None:
        weights = jax.tree.map(lambda w: w.astype(dtype), weights)
    leaves = dict(leaf_paths(weights))
    with shared_directory(out, force=force) as work:
        check_space(work, parameters.size_in_bytes(weights))
        save_tree(work / _WEIGHTS, leaves)
        if jax.process_index() == 0:
            file = MethodFile(
                heads.method,
                heads.options,
                heads.base,
                heads.record,
                dtype=str(next(iter(leaves.values())).dtype),
                files=take_inventory(work / _WEIGHTS),
            )
            write_method(work, file)


def read_weights(
    directory: Path,
    file: MethodFile,
    config: ModelConfig,
    dtype: DTypeLike | None = None,
    mesh: Mesh | None = None,
) -> Any:
    """The weights in a directory of heads, as the spec of their method declares them for a base.

    Args:
      dtype: None is the float type that they are stored in.

    Raises:
      InputError: they are missing, damaged, of other shapes than the base asks for, or NaN.
    """
    declared = declared_weights(directory, file, config)
    place = directory / _WEIGHTS
    if not place.is_dir():
        raise InputError(f"{place} is missing: {directory} holds settings without weights")
    check_inventory(place, file.files, listed_in=FILE)
    if dtype is None:
        if file.dtype not in FLOATS:
            raise unknown_name("dtype", str(file.dtype)[:60], FLOATS)
        dtype = FLOATS[file.dtype]
    wanted = {
        path: jax.ShapeDtypeStruct(weight.shape, dtype, sharding=sharding)
        for (path, weight), sharding in zip(
            leaf_paths(declared), leaf_shardings(declared, mesh), strict=True
        )
    }
    restored = restore_tree(place, wanted)
    damaged = [path for path, leaf in restored.items() if not jnp.isfinite(leaf).all()]
    if damaged:
        raise InputError(f"{place} holds NaN or infinite weights: {', '.join(damaged)}")
    return jax.tree.unflatten(jax.tree.structure(declared), [restored[path] for path in wanted])


def declared_weights(directory: Path, file: MethodFile, config: ModelConfig) -> Any:
    """What the heads of a directory consist of for a base (`parameters.Weight` leaves).

    Raises:
      InputError: a method without trained weights, or options that it does not have.
    """
    if file.method not in methods.SPECS:
        raise InputError(f"{directory}: method '{file.method[:60]}' has no trained heads")
    try:
        return methods.make_spec(file.method, file.options).declare(config)
    except InputError as error:
        raise InputError(f"{directory / FILE}: {error}") from None


def describe_heads(directory: Path) -> dict[str, Any]:
    """What a directory of heads, or of settings alone, says of itself: JSON.

    Raises:
      InputError: it is damaged.
    """
    file = read_method(directory)
    shapes: dict[str, list[int]] = {}
    if file.files is not None:
        check_inventory(directory / _WEIGHTS, file.files, listed_in=FILE)
        shapes = stored_shapes(directory / _WEIGHTS)
    record = dict(file.record)
    accuracies, vocabulary = accuracies_of(record), record.get(VOCABULARY)
    if accuracies is not None:
        record[ACCURACIES] = accuracies.tolist()
    if not isinstance(vocabulary, list | None):
        raise InputError(f"'{VOCABULARY}' in {directory / FILE} must be a list of ids")
    return {
        "path": str(directory),
        "format": "heads",
        "method": file.method,
        "options": dict(file.options),
        "base": file.base,
        "dtype": file.dtype,
        "parameters": sum(math.prod(shape) for shape in shapes.values()),
        "shapes": shapes,
        "record": record,
    }
