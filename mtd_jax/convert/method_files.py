"""A method's settings on disk: `DIR/method.json`, with the fingerprint of the base they are for."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mtd_jax.convert.atomic import write_file
from mtd_jax.convert.json_files import parse_object
from mtd_jax.errors import InputError

FILE = "method.json"
_FORMAT = 1


@dataclasses.dataclass(frozen=True)
class MethodFile:
    """What `method.json` says."""

    method: str
    options: Mapping[str, Any]
    """As for `--option`."""
    base: str
    """Fingerprint of the model they were found for."""
    record: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    """How they were found: for people, and for trees (`decoding.heads.ACCURACIES`)."""
    dtype: str | None = None
    """Name of the float type that weights are stored in; None: there are none, only settings."""
    files: Mapping[str, Any] | None = None
    """The inventory of the weights beside the file."""

    def check_base(self, fingerprint: str, path: Path) -> None:
        """Refuses another model than the one the settings are for.

        Raises:
          InputError: the fingerprints differ.
        """
        if self.base != fingerprint:
            raise InputError(f"{path} was made for another base model ({self.base[:12]}...)")


def read_method(directory: Path) -> MethodFile:
    """The settings in a directory.

    Raises:
      InputError: there are none, or they are not what `write_method` writes.
    """
    path = directory / FILE
    try:
        values = parse_object(path.read_bytes(), FILE)
    except FileNotFoundError:
        raise InputError(f"no {FILE} in {directory}") from None
    except (OSError, InputError) as error:
        raise InputError(f"cannot read {path}: {error}") from None
    if values.get("format") != _FORMAT:
        raise InputError(f"{path} is not format {_FORMAT} of a method's settings")
    method, options, base = (values.get(key) for key in ("method", "options", "base"))
    if not (isinstance(method, str) and isinstance(options, dict) and isinstance(base, str)):
        raise InputError(f"{path} must hold 'method', 'options' and 'base'")
    record, dtype, files = (values.get(key) for key in ("record", "dtype", "files"))
    if not isinstance(record, dict | None):
        raise InputError(f"{path}: 'record' must be an object")
    if not (isinstance(dtype, str | None) and isinstance(files, dict | None)):
        raise InputError(f"{path}: 'dtype' must be text and 'files' an object")
    return MethodFile(method, options, base, record or {}, dtype, files)


def write_method(directory: Path, settings: MethodFile) -> None:
    """Writes the settings, over older ones.

    Raises:
      InputError: the directory cannot be made or written.
    """
    values = {"format": _FORMAT, **dataclasses.asdict(settings)}
    values = {key: value for key, value in values.items() if value is not None}
    write_file(directory / FILE, json.dumps(values, indent=2) + "\n")
