"""Stacked, fused leaves from the tensors of any file format, and tensors back from leaves."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, SingleDeviceSharding

from mtd_jax.config import ModelConfig
from mtd_jax.convert.families import TensorRule
from mtd_jax.convert.layout import Layout, axis_sizes
from mtd_jax.convert.tensor_source import FLOATS, Index, TensorSource, check_finite
from mtd_jax.errors import InputError, listed
from mtd_jax.progress import progress
from mtd_jax.sharding import shardings
from mtd_jax.transformer.model import Parameters, declare

_CHUNK = 2**20  # values read at a time: 4 MB of float32


@dataclasses.dataclass(frozen=True)
class Piece:
    """A tensor of the file (one a layer, if stacked) and the part of a leaf that it fills."""

    key: str
    layout: Layout
    stacked: bool
    axis: int
    """The axis of one layer's leaf along which pieces lie side by side."""
    start: int
    """Where this piece begins on it."""

    def name(self, layer: int) -> str:
        """The tensor's name in the file."""
        return self.key.format(layer)

    def names(self, config: ModelConfig) -> list[str]:
        """Its tensors: one, or one a layer."""
        return [self.name(layer) for layer in range(config.num_layers if self.stacked else 1)]


def plan(config: ModelConfig, rules: Sequence[TensorRule]) -> dict[str, tuple[Piece, ...]]:
    """For the path of every leaf of the model, the tensors that fill it."""
    sizes = axis_sizes(config)
    leaves: dict[str, tuple[Piece, ...]] = {}
    for path, weight in leaf_paths(declare(config)):
        stacked = path.startswith("blocks.")
        shape = weight.shape[1:] if stacked else weight.shape
        pieces: list[Piece] = []
        start = 0
        for rule in rules:
            if rule.leaf != path:
                continue
            layout = Layout.parse(rule.pattern, sizes)
            part = layout.leaf_shape
            narrower = [a for a in range(len(shape)) if part[a] != shape[a]]
            axis = narrower[0] if narrower else 0
            pieces.append(Piece(rule.key, layout, stacked, axis, start))
            start += part[axis]
        leaves[path] = tuple(pieces)
    return leaves


def leaf_paths(tree: Any) -> list[tuple[str, Any]]:
    """The leaves of a parameter tree (arrays, or `Weight`s) with their paths, `blocks.qkv`."""
    flat, _ = jax.tree.flatten_with_path(tree)
    return [(jax.tree_util.keystr(path, simple=True, separator="."), leaf) for path, leaf in flat]


def stored_form(params: Parameters) -> Parameters:
    """Undoes `model.prepare_for_decoding`: layers stacked, no copy of a tied embedding."""
    blocks = params.blocks
    if isinstance(blocks, tuple):
        blocks = jax.tree.map(lambda *layers: jnp.stack(layers), *blocks)
    head = None if params.config.tie_embeddings else params.head
    return params.replace(blocks=blocks, head=head)


def leaf_shardings(declared: Any, mesh: Mesh | None) -> list[jax.sharding.Sharding]:
    """Where each declared leaf goes: over the mesh, or onto the first device."""
    if mesh is not None:
        return [sharding for _, sharding in leaf_paths(shardings(mesh, declared))]
    here = SingleDeviceSharding(jax.local_devices()[0])
    return [here for _ in jax.tree.leaves(declared)]


def check_tensors(
    config: ModelConfig,
    source: TensorSource,
    leaves: Mapping[str, Sequence[Piece]],
    is_harmless: Callable[[str], bool],
) -> None:
    """Compares the tensors of a checkpoint with those that the model needs.

    Raises:
      InputError: names all that are missing, not needed, of wrong shape, or of no usable dtype, and
        those that the source itself has something against.
    """
    needed = {
        name: piece.layout.file_shape
        for pieces in leaves.values()
        for piece in pieces
        for name in piece.names(config)
    }
    there = set(source.names())
    extra = [f"'{name[:200]}'" for name in there - needed.keys() if not is_harmless(name)]
    shapes: list[str] = []
    dtypes: list[str] = []
    for name in needed.keys() & there:
        if source.shape(name) != needed[name]:
            shapes.append(f"'{name}' is {list(source.shape(name))}, not {list(needed[name])}")
        try:
            source.dtype(name)
        except InputError as error:
            dtypes.append(str(error))
    problems = {
        **source.problems(),
        "missing tensors": [f"'{name}'" for name in needed.keys() - there],
        "tensors that this model does not have": extra,
        "wrong shapes": shapes,
        "wrong types": dtypes,
    }
    found = [f"{what}: {listed(sorted(names))}" for what, names in problems.items() if names]
    if found:
        raise InputError("the weights do not fit the config; " + "; ".join(found))


def stored_dtype(
    config: ModelConfig,
    source: TensorSource,
    leaves: Mapping[str, Sequence[Piece]],
    *,
    matrices_only: bool = False,
) -> np.dtype:
    """The one dtype of all weights, or float32, which holds every value of the others."""
    found = {
        source.dtype(name)
        for pieces in leaves.values()
        for piece in pieces
        if len(piece.layout.file_shape) > 1 or not matrices_only
        for name in piece.names(config)
    }
    return found.pop() if len(found) == 1 else FLOATS["float32"]


def assemble(
    config: ModelConfig,
    source: TensorSource,
    leaves: Mapping[str, Sequence[Piece]],
    dtype: np.dtype,
    mesh: Mesh | None,
) -> Parameters:
    """The parameters of a checkpoint that `check_tensors` has passed.

    Each device's shard is made from the parts of tensors that it needs. Beside what is returned,
    memory holds a few MB of one tensor, and one shard where a device has memory of its own.

    Raises:
      InputError: a weight is NaN or infinite, or too large for `dtype`.
    """
    declared = declare(config)
    placed = leaf_shardings(declared, mesh)
    values = []
    steps = sum(len(piece.names(config)) for pieces in leaves.values() for piece in pieces)
    with progress("reading weights", steps) as shown:
        for (path, weight), sharding in zip(leaf_paths(declared), placed, strict=True):
            read = _reader(source, leaves[path], dtype, shown.advance)
            values.append(_make_array(weight.shape, sharding, read))
    return jax.tree.unflatten(jax.tree.structure(declared), values)


def disassemble(
    config: ModelConfig, params: Parameters, leaves: Mapping[str, Sequence[Piece]]
) -> Iterator[tuple[str, np.ndarray]]:
    """Every tensor of the file format with its name, layer by layer, as views of the leaves."""
    values = {path: np.asarray(leaf) for path, leaf in leaf_paths(params)}
    for layer in range(-1, config.num_layers):
        for path, pieces in leaves.items():
            for piece in pieces:
                if piece.stacked != (layer >= 0):
                    continue
                leaf = values[path][layer] if piece.stacked else values[path]
                stop = piece.start + piece.layout.leaf_shape[piece.axis]
                cut = (*[slice(None)] * piece.axis, slice(piece.start, stop))
                yield piece.name(layer), piece.layout.to_file(leaf[cut])


def _make_array(
    shape: tuple[int, ...],
    sharding: jax.sharding.Sharding,
    read: Callable[[Index], np.ndarray],
) -> jax.Array:
    # Devices that hold the same part (replicas) share one reading of it.
    last: dict[tuple[tuple[int, int], ...], np.ndarray] = {}

    def fetch(index: Any) -> np.ndarray:
        spans = tuple(s.indices(size)[:2] for s, size in zip(index, shape, strict=True))
        if spans not in last:
            last.clear()
            last[spans] = read(tuple(slice(*span) for span in spans))
        return last[spans]

    return jax.make_array_from_callback(shape, sharding, fetch)


def _reader(
    source: TensorSource,
    pieces: Sequence[Piece],
    dtype: np.dtype,
    advance: Callable[[], None],
) -> Callable[[Index], np.ndarray]:
    """A function that makes any part of a leaf."""

    def read(index: Index) -> np.ndarray:
        out = aligned_empty(tuple(s.stop - s.start for s in index), dtype)
        stacked = pieces[0].stacked
        layers = index[0] if stacked else slice(0, 1)
        inside = index[1:] if stacked else index
        for layer in range(layers.start, layers.stop):
            target = out[layer - layers.start] if stacked else out
            for piece in pieces:
                _fill(source, piece, layer, target, inside)
                advance()
        return out

    return read


def _fill(source: TensorSource, piece: Piece, layer: int, target: np.ndarray, index: Index) -> None:
    """Writes what a tensor gives to the part `index` of one layer's leaf into `target`."""
    axis, span = piece.axis, index[piece.axis]
    first = max(span.start, piece.start)
    last = min(span.stop, piece.start + piece.layout.leaf_shape[axis])
    if first >= last:
        return
    name = piece.name(layer)

    def fetch(wanted: Index) -> np.ndarray:
        values = source.read(name, wanted)
        check_finite(values, f"{source.place(name)}: tensor '{name}'")
        if values.dtype == target.dtype:
            return values
        with np.errstate(over="ignore"):
            values = values.astype(target.dtype)
        check_finite(values, f"{source.place(name)}: tensor '{name}' as {target.dtype.name}")
        return values

    own = slice(first - piece.start, last - piece.start)
    into = target[(*[slice(None)] * axis, slice(first - span.start, last - span.start))]
    for part, place in _chunks(piece.layout, (*index[:axis], own, *index[axis + 1 :])):
        into[place] = piece.layout.to_leaf(fetch, part)


def _chunks(layout: Layout, index: Index) -> Iterator[tuple[Index, Index]]:
    """Cuts a part of a leaf along the tensor's outermost axis, so that little is read at a time.

    Yields parts of the leaf, and where they lie in `index`. What reading takes beside its result
    (dequantised floats, other dtypes) is then a few MB, however large the tensor is.
    """
    axis = layout.outer_leaf_axis
    if axis is None:
        yield index, ()
        return
    span = index[axis]
    row = math.prod(layout.file_shape) // layout.leaf_shape[axis]
    step = max(1, _CHUNK // row)
    for start in range(span.start, span.stop, step):
        part = slice(start, min(start + step, span.stop))
        place = slice(start - span.start, part.stop - span.start)
        yield (*index[:axis], part, *index[axis + 1 :]), (*[slice(None)] * axis, place)


def aligned_empty(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """An uninitialised array at a 64-byte boundary, which JAX takes over on CPU without copying."""
    size = math.prod(shape) * dtype.itemsize
    raw = np.empty(size + 64, np.uint8)
    offset = -raw.ctypes.data % 64
    return raw[offset : offset + size].view(dtype).reshape(shape)
