"""Options of methods as they are written on a command line or in a config."""

from __future__ import annotations

import types
import typing
from collections.abc import Mapping
from typing import Any, Literal

from mtd_jax.errors import InputError, unknown_name

_UNIONS = (typing.Union, types.UnionType)


def read_options(name: str, known: Mapping[str, Any], options: Mapping[str, Any]) -> dict[str, Any]:
    """Options of a method, each of the type that `known` says; text is read.

    Raises:
      InputError: an unknown option (the nearest known one is named), or a wrong value.
    """
    for option in options:
        if option not in known:
            raise unknown_name(f"option of method '{name}'", option, known)
    return {key: typed_value(key, known[key], value) for key, value in options.items()}


def typed_value(name: str, kind: Any, value: Any) -> Any:
    """The value as `kind` wants it: text is read, everything else checked."""
    choices: list[Any] = []
    switches = {"true": True, "false": False}
    for part in typing.get_args(kind) if typing.get_origin(kind) in _UNIONS else (kind,):
        if typing.get_origin(part) is Literal:
            choices += typing.get_args(part)
            if value in typing.get_args(part):
                return value
        elif part is types.NoneType:
            if value is None:
                return value
            continue
        elif part is bool:
            choices += switches
            if isinstance(value, bool):
                return value
            if isinstance(value, str) and value in switches:
                return switches[value]
            continue
        elif isinstance(value, (int, float) if part is float else part):
            if not isinstance(value, bool):
                return value
        elif isinstance(value, str):
            try:
                return part(value)
            except ValueError:
                pass
        choices += [part.__name__] if isinstance(part, type) else []
    wanted = " or ".join(dict.fromkeys(str(choice) for choice in choices))
    raise InputError(f"option '{name}' must be {wanted}, got {value!r}")


def layer_numbers(name: str, text: str) -> frozenset[int]:
    """Layer numbers from `3,8,10-14`, or `3+8+10-14` where commas part methods (`mtd bench`)."""
    found: set[int] = set()
    for part in filter(None, text.replace("+", ",").split(",")):
        first, dash, last = part.strip().partition("-")
        ends = first, last if dash else first
        if not all(end.isdecimal() and len(end) < 6 for end in ends):
            raise InputError(f"{name} takes layer numbers like 3,8,10-14, got '{part[:40]}'")
        if int(ends[0]) > int(ends[1]):
            raise InputError(f"{name}: a range begins with its smaller number, got '{part[:40]}'")
        found.update(range(int(ends[0]), int(ends[1]) + 1))
    return frozenset(found)
