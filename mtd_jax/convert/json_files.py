"""JSON files from anywhere: read with bounds; every way of being wrong is an `InputError`."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

from mtd_jax.errors import InputError

MAX_BYTES = 100_000_000
"""safetensors' own bound for a header; far above any tokenizer or config."""


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file.

    Raises:
      InputError: the file is missing, unreadable, too large, not JSON, or not an object.
    """
    try:
        if path.stat().st_size > MAX_BYTES:
            raise InputError(f"{path.name} is larger than {MAX_BYTES // 1_000_000} MB")
        data = path.read_bytes()
    except FileNotFoundError:
        raise InputError(f"no such file: {path}") from None
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror}") from error
    return parse_object(data, path.name)


def parse_object(data: bytes, what: str) -> dict[str, Any]:
    """The JSON object in `data`; `what` names it in errors.

    Raises:
      InputError: not UTF-8, not JSON, nested too deeply, a key given twice, or not an object.
    """

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) != len(pairs):
            keys = sorted(key for key, _ in pairs)
            twice = next(a for a, b in itertools.pairwise(keys) if a == b)
            raise InputError(f"{what} gives the key '{twice[:100]}' twice")
        return found

    try:
        value = json.loads(data.decode("utf-8"), object_pairs_hook=unique)
        if b"\\u" in data:  # the only way to half a surrogate pair, of which no file name is made
            json.dumps(value, ensure_ascii=False).encode("utf-8")
    except InputError:
        raise
    except RecursionError:
        raise InputError(f"{what} is nested too deeply") from None
    except ValueError as error:  # UnicodeDecodeError and JSONDecodeError
        raise InputError(f"{what} is not JSON: {str(error)[:120]}") from None
    if not isinstance(value, dict):
        raise InputError(f"{what} must hold a JSON object, not {type(value).__name__}")
    return value
