"""The files of a directory with their sizes, so that damage is noticed before anything reads them.

Orbax and TensorStore meet a truncated file in a background thread, with pages of output.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

from mtd_jax.errors import InputError

# Small files hold structure and are hashed; of weights, only the size is worth the time.
_HASHED_BYTES = 1 << 20


def take_inventory(directory: Path) -> dict[str, list[Any]]:
    """Relative path -> [size in bytes, SHA-256 or null] of every file below a directory."""
    return {
        path.relative_to(directory).as_posix(): _describe(path)
        for path in sorted(directory.rglob("*"))
        if path.is_file()
    }


def check_inventory(directory: Path, inventory: Any, *, listed_in: str = "config.json") -> None:
    """Compares a directory with what `take_inventory` found in it.

    Args:
      listed_in: the file beside the directory that holds the inventory.

    Raises:
      InputError: names the first file that is missing or changed, or the inventory is malformed.
    """
    if not isinstance(inventory, dict) or not inventory:
        raise InputError(f"{directory.parent}/{listed_in} does not list the files of {directory}")
    for name, expected in inventory.items():
        path = directory / name
        if not _lies_below(directory, path):
            raise InputError(f"{directory.parent}/{listed_in} lists {name[:100]!r} elsewhere")
        if not path.is_file():
            raise InputError(f"{path} is missing")
        try:
            found = _describe(path)
        except OSError as error:
            raise InputError(f"cannot read {path}: {error.strerror}") from error
        if found != expected:
            raise InputError(f"{path} is truncated or was changed")


def _lies_below(directory: Path, path: Path) -> bool:
    try:
        return path.resolve().is_relative_to(directory.resolve())
    except (OSError, RuntimeError, ValueError):  # links in a circle, or a zero byte in the name
        return False


def _describe(path: Path) -> list[Any]:
    size = path.stat().st_size
    small = size <= _HASHED_BYTES
    return [size, hashlib.sha256(path.read_bytes()).hexdigest() if small else None]
