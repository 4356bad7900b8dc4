"""The table of decoding methods: the command line's name -> how one is made from its options."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

from mtd_jax.decoding.method import Method
from mtd_jax.errors import unknown_name
from mtd_jax.methods.autoregressive import Autoregressive


def autoregressive() -> Autoregressive:
    """One token a step from the base model (`ar`)."""
    return Autoregressive()


METHODS: Mapping[str, Callable[..., Method]] = MappingProxyType(
    {Autoregressive.name: autoregressive}
)


def make_method(name: str, options: Mapping[str, Any]) -> Method:
    """The method of that name with these options.

    Raises:
      InputError: an unknown method or option; the nearest known one is named.
    """
    if name not in METHODS:
        raise unknown_name("method", name, METHODS)
    factory = METHODS[name]
    known = factory.__annotations__.keys() - {"return"}
    for option in options:
        if option not in known:
            raise unknown_name(f"option of method '{name}'", option, known)
    return factory(**options)
