"""The table of decoding methods: the command line's name -> how one is made from its options."""

from __future__ import annotations

import types
import typing
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, Literal

import jax.numpy as jnp

from mtd_jax import backend
from mtd_jax.decoding.method import Method
from mtd_jax.decoding.speculative import Acceptance
from mtd_jax.decoding.tree import MAX_NODES, TokenTree
from mtd_jax.errors import InputError, unknown_name
from mtd_jax.methods.autoregressive import Autoregressive
from mtd_jax.methods.ngram import NGram
from mtd_jax.methods.prompt_lookup import PromptLookup

Drafts = int | Literal["auto"]
"""Tokens drafted a step; `auto` weighs measured costs against measured acceptance, 0 included."""

_AUTO_SIZES = (1, 4, 8, 16)
_LONGEST_MATCH = 64
_UNIONS = (typing.Union, types.UnionType)


def autoregressive() -> Autoregressive:
    """One token a step from the base model (`ar`)."""
    return Autoregressive()


def ngram(
    drafts: Drafts = "auto",
    longest: int = 6,
    branches: str = "",
    acceptance: Acceptance = "exact",
) -> NGram:
    """Adaptive n-grams over prompt and answer (`ngram`).

    Args:
      drafts: tokens drafted a step, or `auto`.
      longest: the highest order: tokens of context that are told apart.
      branches: children of each node by depth, `3,2,1`: a tree of guesses instead of a chain.
      acceptance: `exact`, or `typical`, which keeps what is likely enough (lossy).
    """
    return _copying(NGram, drafts, longest, branches, acceptance)


def prompt_lookup(
    drafts: Drafts = "auto", longest: int = 3, acceptance: Acceptance = "exact"
) -> PromptLookup:
    """The continuation of the first earlier occurrence of the newest tokens (`prompt_lookup`).

    Args:
      drafts: tokens drafted a step, or `auto`.
      longest: tokens that are looked for; fewer, if they do not occur.
      acceptance: `exact`, or `typical`, which keeps what is likely enough (lossy).
    """
    return _copying(PromptLookup, drafts, longest, "", acceptance)


METHODS: Mapping[str, Callable[..., Method]] = MappingProxyType(
    {
        Autoregressive.name: autoregressive,
        NGram.name: ngram,
        PromptLookup.name: prompt_lookup,
    }
)


def make_method(name: str, options: Mapping[str, Any]) -> Method:
    """The method of that name with these options; values may be text, as on the command line.

    Raises:
      InputError: an unknown method or option (the nearest known one is named), or a wrong value.
    """
    if name not in METHODS:
        raise unknown_name("method", name, METHODS)
    factory = METHODS[name]
    known = typing.get_type_hints(factory)
    known.pop("return")
    for option in options:
        if option not in known:
            raise unknown_name(f"option of method '{name}'", option, known)
    return factory(**{key: _typed(key, known[key], value) for key, value in options.items()})


def _copying(
    kind: Callable[..., Any], drafts: Drafts, longest: int, branches: str, acceptance: Acceptance
) -> Any:
    if not 1 <= longest <= _LONGEST_MATCH:
        raise InputError(f"longest must be between 1 and {_LONGEST_MATCH}, got {longest}")
    if branches:
        if drafts != "auto":
            raise InputError("give drafts or branches, not both: branches say how many there are")
        widths = [_typed("branches", int, part) for part in branches.split(",")]
        if min(widths) < 1:
            raise InputError(f"branches must be at least 1 each, got '{branches}'")
        tree = TokenTree.branching(*widths)
        sizes: tuple[int, ...] = (1, tree.size)
    elif drafts == "auto":
        sizes = _AUTO_SIZES
        tree = TokenTree.chain(sizes[-1] - 1)
    else:
        if not 0 <= drafts < MAX_NODES:
            raise InputError(f"drafts must be between 0 and {MAX_NODES - 1}, got {drafts}")
        tree = TokenTree.chain(drafts)
        sizes = (1, tree.size) if drafts else (1,)
    if drafts == "auto" and not branches:
        costs = [backend.relative_step_cost(size) for size in sizes]
    else:
        # As many as asked for, wherever there is anything to verify.
        costs = [1.0] * len(sizes)
    return kind(
        costs=jnp.asarray(costs, jnp.float32),
        tree=tree,
        sizes=sizes,
        longest=longest,
        acceptance=acceptance,
    )


def _typed(name: str, kind: Any, value: Any) -> Any:
    """The value as `kind` wants it: text is read, everything else checked."""
    choices: list[Any] = []
    for part in typing.get_args(kind) if typing.get_origin(kind) in _UNIONS else (kind,):
        if typing.get_origin(part) is Literal:
            choices += typing.get_args(part)
            if value in typing.get_args(part):
                return value
        elif isinstance(value, part) and not isinstance(value, bool):
            return value
        elif isinstance(value, str):
            try:
                return part(value)
            except ValueError:
                pass
        choices += [part.__name__] if isinstance(part, type) else []
    wanted = " or ".join(dict.fromkeys(str(choice) for choice in choices))
    raise InputError(f"option '{name}' must be {wanted}, got {value!r}")
