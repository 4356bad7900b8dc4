"""safetensors files, one or sharded, read slice by slice and trusted in nothing.

The header is parsed here, not by the library: numpy has no bfloat16 for `safe_open` to return, and
each way in which a file can lie must be named. Tensors are mapped one at a time and unmapped after
use, so that pages of a checkpoint that was read do not count as memory of this process.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mtd_jax.convert.json_files import MAX_BYTES, parse_object, read_json
from mtd_jax.convert.tensor_source import FLOATS, Index
from mtd_jax.errors import InputError, listed

INDEX_NAME = "model.safetensors.index.json"
SINGLE_NAME = "model.safetensors"

# https://github.com/huggingface/safetensors#format: bytes an element.
_ITEM_SIZES = {
    **dict.fromkeys(("BOOL", "U8", "I8", "F8_E4M3", "F8_E5M2", "F8_E8M0"), 1),
    **dict.fromkeys(("U16", "I16", "F16", "BF16"), 2),
    **dict.fromkeys(("U32", "I32", "F32"), 4),
    **dict.fromkeys(("U64", "I64", "F64"), 8),
}
_FLOAT_NAMES = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}
_TWICE = "duplicated tensors"
_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")


@dataclasses.dataclass(frozen=True)
class Entry:
    """Where a tensor lies."""

    file: Path
    dtype: str
    shape: tuple[int, ...]
    start: int
    """First byte in the file."""


class SafetensorsFiles:
    """The tensors of a checkpoint directory (a `TensorSource`)."""

    def __init__(
        self, entries: Mapping[str, Entry], problems: Mapping[str, Sequence[str]] | None = None
    ) -> None:
        self._entries = dict(entries)
        self._problems = dict(problems or {})

    def names(self) -> Iterable[str]:
        """All tensors there are."""
        return self._entries.keys()

    def problems(self) -> Mapping[str, Sequence[str]]:
        """Tensors that are in several files, and those that are not where the index says."""
        return self._problems

    def shape(self, name: str) -> tuple[int, ...]:
        """Its sizes, outermost axis first."""
        return self._entries[name].shape

    def dtype(self, name: str) -> np.dtype:
        """Its element type.

        Raises:
          InputError: it is not float32, bfloat16 or float16.
        """
        entry = self._entries[name]
        if entry.dtype not in _FLOAT_NAMES:
            raise InputError(
                f"{entry.file.name}: tensor '{name}' has dtype {entry.dtype}; "
                "F32, BF16 and F16 are supported"
            )
        return FLOATS[_FLOAT_NAMES[entry.dtype]]

    def read(self, name: str, index: Index) -> np.ndarray:
        """A part of a tensor, mapped; let go of it before the next call.

        Raises:
          InputError: the file vanished, shrank or cannot be read.
        """
        entry = self._entries[name]
        dtype = self.dtype(name)
        if math.prod(entry.shape) == 0:
            return np.zeros(entry.shape, dtype)[index]
        try:
            mapped = np.memmap(
                entry.file, dtype=dtype, mode="r", offset=entry.start, shape=entry.shape
            )
        except (OSError, ValueError) as error:
            raise InputError(f"{entry.file.name}: cannot read '{name}': {error}") from error
        return np.asarray(mapped)[index]

    def place(self, name: str) -> str:
        """The file that holds it, for error messages."""
        return self._entries[name].file.name


def open_safetensors(directory: Path) -> SafetensorsFiles:
    """The tensors of a directory: by its index, else model.safetensors, else all .safetensors.

    Tensors in several files or not where the index says are `problems()`, to be named with those
    that a model has with them.

    Raises:
      InputError: no file, only pickles, or a file or index that is malformed.
    """
    if (directory / INDEX_NAME).is_file():
        return _indexed(directory)
    if (directory / SINGLE_NAME).exists():
        return SafetensorsFiles(read_header(file_inside(directory, SINGLE_NAME)))
    files = sorted(p.name for p in directory.glob("*.safetensors"))
    if not files:
        refuse_pickles(directory)
        raise InputError(f"{directory} holds no .safetensors file")
    entries, twice = _merge(directory, files)
    return SafetensorsFiles(entries, {_TWICE: twice})


def refuse_pickles(path: Path) -> None:
    """Says what to do about a pickle, or a directory that holds some, where no weights were found.

    Raises:
      InputError: there are pickles.
    """
    files = sorted(path.iterdir()) if path.is_dir() else [path]
    for file in files:
        if file.suffix in _PICKLES:
            raise InputError(
                f"{path} holds only pickled weights ({file.name}), which can run code when "
                "they are read; convert them to safetensors first"
            )


def read_header(file: Path) -> dict[str, Entry]:
    """The tensors that a file's header declares, each checked against the file's size.

    Raises:
      InputError: truncated, overlapping, out of bounds, duplicated or malformed entries.
    """
    try:
        size = file.stat().st_size
        with file.open("rb") as stream:
            prefix = stream.read(8)
            length = int.from_bytes(prefix, "little")
            if len(prefix) < 8 or length > size - 8:
                raise InputError(f"{file.name} is truncated: its header does not fit into it")
            if length > MAX_BYTES:
                raise InputError(f"{file.name}: a header of {length} bytes is absurd")
            header = parse_object(stream.read(length), f"the header of {file.name}")
    except FileNotFoundError:
        raise InputError(f"no such file: {file}") from None
    except OSError as error:
        raise InputError(f"cannot read {file}: {error.strerror}") from error
    header.pop("__metadata__", None)
    data = 8 + length
    spans = {name: _span(file, name, info) for name, info in header.items()}
    _check_spans(file, spans, size - data)
    return {
        name: Entry(file, info["dtype"], tuple(info["shape"]), data + spans[name][0])
        for name, info in header.items()
    }


def write_safetensors(
    file: Path,
    tensors: Sequence[tuple[str, np.ndarray]],
    advance: Callable[[], None] = lambda: None,
) -> None:
    """Writes one file, tensor by tensor, so that views are made contiguous one at a time.

    The library's `serialize_file` wants the bytes of all of them at once.
    """
    names = {dtype: name for name, dtype in _FLOAT_NAMES.items()}
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    position = 0
    for name, values in tensors:
        header[name] = {
            "dtype": names[values.dtype.name],
            "shape": values.shape,
            "data_offsets": [position, position + values.nbytes],
        }
        position += values.nbytes
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with file.open("wb") as stream:
        stream.write(len(text).to_bytes(8, "little"))
        stream.write(text)
        for _, values in tensors:
            stream.write(values.tobytes())
            advance()


def _span(file: Path, name: str, info: Any) -> tuple[int, int]:
    """First and last byte of a tensor, counted from the end of the header."""
    what = f"{file.name}: tensor '{name[:200]}'"
    if not isinstance(info, dict):
        raise InputError(f"{what} has no description")
    dtype, shape, offsets = info.get("dtype"), info.get("shape"), info.get("data_offsets")
    if not isinstance(dtype, str) or dtype not in _ITEM_SIZES:
        raise InputError(f"{what} has unknown dtype {str(dtype)[:40]}")
    sizes = _sizes(shape)
    if sizes is None or len(sizes) > 8:
        raise InputError(f"{what} has no valid shape")
    span = _sizes(offsets)
    if span is None or len(span) != 2:
        raise InputError(f"{what} has no valid data_offsets")
    start, stop = span
    if stop - start != math.prod(sizes) * _ITEM_SIZES[dtype]:
        raise InputError(f"{what}: {stop - start} bytes do not fit shape {sizes} of {dtype}")
    return start, stop


def _sizes(value: Any) -> list[int] | None:
    """The value, if it is a list of numbers that are not negative."""
    is_list = isinstance(value, list) and all(type(v) is int and v >= 0 for v in value)
    return list(value) if is_list else None


def _check_spans(file: Path, spans: Mapping[str, tuple[int, int]], size: int) -> None:
    """Tensors must follow each other without gap or overlap, to the end of the file."""
    position = 0
    for name, (start, stop) in sorted(spans.items(), key=lambda item: item[1]):
        what = f"{file.name}: tensor '{name[:200]}'"
        if start < position:
            raise InputError(f"{what} overlaps the one before it")
        if start > position:
            raise InputError(f"{what} leaves a gap of {start - position} bytes before it")
        if stop > size:
            raise InputError(f"{what} ends at byte {stop} of {size}: the file is truncated")
        position = stop
    if position != size:
        raise InputError(f"{file.name} has {size - position} bytes behind its last tensor")


def _indexed(directory: Path) -> SafetensorsFiles:
    weight_map = read_json(directory / INDEX_NAME).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise InputError(f"{INDEX_NAME} has no weight_map")
    for name, file in weight_map.items():
        if (
            not isinstance(file, str)
            or Path(file).name != file
            or file in ("", "..")
            or "\\" in file
            or "\0" in file
        ):
            raise InputError(
                f"{INDEX_NAME}: tensor '{name[:200]}' points outside the directory: "
                f"{str(file)[:100]!r}"
            )
    files = sorted(set(weight_map.values()))
    gone = [name for name in files if not os.path.lexists(directory / name)]
    if gone:
        raise InputError(f"no such file in {directory}: {listed(gone)} ({len(files)} are needed)")
    entries, twice = _merge(directory, files)
    elsewhere = [
        f"'{name[:200]}' is not in {file}"
        for name, file in weight_map.items()
        if name not in entries or entries[name].file.name != file
    ]
    return SafetensorsFiles(entries, {_TWICE: twice, f"wrong in {INDEX_NAME}": elsewhere})


def file_inside(directory: Path, name: str) -> Path:
    """The regular file `name` of a directory, refused if it is a link that leads elsewhere.

    The hub's cache links each file of `snapshots/REVISION/` into the `blobs/` beside `snapshots/`.

    Raises:
      InputError: such a link, or a directory, a device, a pipe, or nothing there.
    """
    root = directory.resolve()
    try:
        target = (directory / name).resolve()
    except (OSError, RuntimeError):
        raise InputError(f"no such file: {directory / name} (links in a circle)") from None
    allowed = [root]
    if root.parent.name == "snapshots":
        allowed.append(root.parent.parent / "blobs")
    if not any(target.is_relative_to(place) for place in allowed):
        raise InputError(f"{name} is a link to a place outside {directory}")
    if not target.exists():
        raise InputError(f"no such file: {directory / name}")
    if not target.is_file():
        raise InputError(f"{directory / name} is no regular file")
    return directory / name


def _merge(directory: Path, files: Sequence[str]) -> tuple[dict[str, Entry], list[str]]:
    """The tensors of all files, and in words those that an earlier file has already."""
    merged: dict[str, Entry] = {}
    twice: list[str] = []
    for file in files:
        for name, entry in read_header(file_inside(directory, file)).items():
            if name in merged:
                twice.append(f"'{name[:200]}' is in both {merged[name].file.name} and {file}")
            else:
                merged[name] = entry
    return merged, twice
