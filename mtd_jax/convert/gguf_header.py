"""Walks a GGUF header before the library reads it, so that no count or length in it is believed.

The library's reader loops as often as the file says and takes what lies behind the end for empty.
https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

from __future__ import annotations

import mmap
import struct
from pathlib import Path

from mtd_jax.errors import InputError

_SCALARS = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}
_STRING, _ARRAY = 8, 9
_VERSIONS = (2, 3)
_MOST_DIMENSIONS = 4
_LONGEST_NAME = 65_535


def check_header(file: Path) -> None:
    """Refuses a file whose header does not fit into it.

    Raises:
      InputError: not a GGUF file, of an unknown version, truncated, or with absurd counts.
    """
    try:
        with file.open("rb") as stream:
            if stream.read(4) != b"GGUF":
                raise InputError(f"{file.name} is not a GGUF file")
            with mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as data:
                _Walk(file.name, data).run()
    except OSError as error:
        raise InputError(f"cannot read {file}: {error.strerror}") from error


class _Walk:
    def __init__(self, name: str, data: mmap.mmap) -> None:
        self._name = name
        self._data = data
        self._at = 4

    def run(self) -> None:
        version = self._number("<I")
        if version not in _VERSIONS:
            raise InputError(f"{self._name}: GGUF version {version} is not supported")
        tensors, keys = self._number("<Q"), self._number("<Q")
        # No entry is shorter than 13 bytes (a key) or 24 (a tensor).
        if keys * 13 + tensors * 24 > len(self._data):
            raise InputError(
                f"{self._name} says it has {tensors} tensors and {keys} keys: it is too small"
            )
        for _ in range(keys):
            self._string(_LONGEST_NAME)
            self._value(self._number("<I"))
        for _ in range(tensors):
            self._string(_LONGEST_NAME)
            dimensions = self._number("<I")
            if not 1 <= dimensions <= _MOST_DIMENSIONS:
                raise InputError(f"{self._name}: a tensor has {dimensions} dimensions")
            self._skip(8 * dimensions + 4 + 8)

    def _value(self, kind: int) -> None:
        if kind == _STRING:
            self._string(len(self._data))
        elif kind == _ARRAY:
            inner, count = self._number("<I"), self._number("<Q")
            if inner in _SCALARS:
                self._skip(count * _SCALARS[inner])
            elif inner == _STRING:
                if count * 8 > len(self._data):
                    raise self._truncated()
                for _ in range(count):
                    self._string(len(self._data))
            else:
                raise InputError(f"{self._name}: arrays of type {inner} are not supported")
        elif kind in _SCALARS:
            self._skip(_SCALARS[kind])
        else:
            raise InputError(f"{self._name}: unknown type {kind} in the header")

    def _string(self, longest: int) -> None:
        length = self._number("<Q")
        if length > longest:
            raise InputError(f"{self._name}: a name or text of {length} bytes is absurd")
        self._skip(length)

    def _number(self, code: str) -> int:
        size = struct.calcsize(code)
        if self._at + size > len(self._data):
            raise self._truncated()
        (value,) = struct.unpack_from(code, self._data, self._at)
        self._at += size
        return int(value)

    def _skip(self, size: int) -> None:
        if self._at + size > len(self._data):
            raise self._truncated()
        self._at += size

    def _truncated(self) -> InputError:
        return InputError(f"{self._name} is truncated: its header ends in the middle")
