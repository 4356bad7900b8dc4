"""The table of decoding methods: the command line's name -> how one is made from its options."""

from __future__ import annotations

import dataclasses
import typing
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, Literal, TypeVar

import jax.numpy as jnp

from mtd_jax import backend
from mtd_jax.config import MAX_CYCLE, Anchor, ModelConfig
from mtd_jax.decoding.heads import Heads, HeadsSpec
from mtd_jax.decoding.method import Method
from mtd_jax.decoding.speculative import Acceptance
from mtd_jax.decoding.tree import MAX_NODES, TokenTree
from mtd_jax.errors import InputError, unknown_name
from mtd_jax.methods import cp_drafting as _cp
from mtd_jax.methods import hidden_transfer as _hidden_transfer
from mtd_jax.methods import hydra as _hydra
from mtd_jax.methods import independent_heads as _independent
from mtd_jax.methods import medusa as _medusa
from mtd_jax.methods.autoregressive import Autoregressive
from mtd_jax.methods.cp_heads import CPSpec
from mtd_jax.methods.dmtd import DMTD
from mtd_jax.methods.independent_heads import IndependentHeadsSpec
from mtd_jax.methods.ngram import LONGEST, NGram
from mtd_jax.methods.options import layer_numbers, read_options, typed_value
from mtd_jax.methods.prompt_lookup import PromptLookup
from mtd_jax.methods.self_speculative import SelfSpeculative
from mtd_jax.methods.transfer import HiddenTransferSpec
from mtd_jax.transformer.stack import Skip

Spec = TypeVar("Spec", bound=HeadsSpec)
Drafts = int | Literal["auto"]
"""Tokens drafted a step; `auto` weighs measured costs against measured acceptance, 0 included."""

_LONGEST_MATCH = 64


def autoregressive() -> Autoregressive:
    """One token a step from the base model (`ar`)."""
    return Autoregressive()


def ngram(
    drafts: Drafts = "auto",
    longest: int = LONGEST,
    branches: str = "",
    acceptance: Acceptance = "exact",
) -> NGram:
    """Adaptive n-grams over prompt and answer (`ngram`).

    Args:
      drafts: tokens drafted a step, or `auto`.
      longest: the highest order: tokens of context that are told apart.
      branches: children of each node by depth, `3x2x1`: a tree of guesses instead of a chain.
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


def self_speculative(
    skip_attention: str = "",
    skip_mlp: str = "",
    drafts: Drafts = "auto",
    threshold: float = 0.6,
    target_acceptance: float = 0.9,
    agreement: float = 0.7,
    share: float = 0.6,
) -> SelfSpeculative:
    """The model drafts for itself with some sublayers left out (`self_speculative`).

    Args:
      skip_attention: layers whose attention drafts leave out: `3,8,10-14`.
      skip_mlp: layers whose MLP drafts leave out.
      drafts: the most tokens drafted a step, or `auto`.
      threshold: drafting ends behind a token less probable than this; it then adapts. 0: never.
      target_acceptance: share of drafts accepted that the threshold steers towards.
      agreement: share of drafts that `auto` takes to be right until it has seen some; `mtd tune`
        measures it.
      share: of the model's weights that a draft reads, by which `auto` decides where costs were not
        measured; `mtd tune` knows it.
    """
    for name, value in (
        *(("threshold", threshold), ("target_acceptance", target_acceptance)),
        *(("agreement", agreement), ("share", share)),
    ):
        if not 0.0 <= value <= 1.0:
            raise InputError(f"{name} must be between 0 and 1, got {value}")
    skip = Skip(
        layer_numbers("skip_attention", skip_attention), layer_numbers("skip_mlp", skip_mlp)
    )
    if not skip.attention and not skip.mlp:
        raise InputError(
            "self_speculative needs layers to skip: find them with `mtd tune self-speculative` and "
            "give its result as --heads, or give the options skip_attention and skip_mlp"
        )
    if drafts == "auto":
        sizes: tuple[int, ...] = (1, 2, 4, 9)
        costs = [backend.relative_step_cost(size) + share * (size - 1) for size in sizes]
    else:
        if not 1 <= drafts < MAX_NODES:
            raise InputError(f"drafts must be between 1 and {MAX_NODES - 1}, got {drafts}")
        sizes = (*(size for size in backend.step_sizes()[1:] if size <= drafts), drafts + 1)
        costs = [1.0] * len(sizes)
    return SelfSpeculative(
        costs=jnp.asarray(costs, jnp.float32),
        threshold=jnp.float32(threshold),
        agreement=jnp.float32(agreement),
        skip=skip,
        sizes=sizes,
        target_acceptance=target_acceptance,
        auto=drafts == "auto",
    )


def dmtd(
    cycle: int = 4,
    early: int | None = None,
    late: int | None = None,
    anchor: Anchor | None = None,
    lossless: bool = False,
) -> DMTD:
    """Cycles of which only the first token passes the middle layers (`dmtd`).

    Args:
      cycle: tokens of a cycle.
      early: layers in front that run for every token; None: as the weights were trained, else 0.
      late: layers at the end that run for every token; None: as the weights were trained, else 8.
      anchor: cycles start behind the `prompt`, or with the `sequence`; None: as the weights were
        trained, else `prompt`.
      lossless: late-only tokens are drafts; the whole model verifies them.
    """
    if not 1 <= cycle <= MAX_CYCLE:
        raise InputError(f"cycle must be between 1 and {MAX_CYCLE}, got {cycle}")
    for name, value, least in (("early", early, 0), ("late", late, 1)):
        if value is not None and value < least:
            raise InputError(f"{name} must be at least {least}, got {value}")
    return DMTD(cycle=cycle, early=early, late=late, anchor=anchor, lossless=lossless)


def medusa(
    heads: Heads, tree: str = "auto", acceptance: Acceptance = "exact", copy: bool = False
) -> _medusa.Medusa:
    """Heads that guess the tokens behind the next one (`medusa`).

    Args:
      heads: from `load_heads`.
      tree: `chain`; `none`; children of each node by depth, `3x2x1`; `measured`: the tree that
        pays, by how often the heads were right on held-out texts; `auto`: the same, and a chain of
        the length that pays where nothing was measured.
      acceptance: `exact`, or `typical`, which keeps what is likely enough (lossy).
      copy: where the text repeats itself, drafts are copied from it as `ngram` does.
    """
    spec = spec_of(heads, _medusa.MedusaSpec)
    return _medusa.make(spec, heads, tree=tree, acceptance=acceptance, copy=copy)


def hydra(
    heads: Heads, tree: str = "auto", acceptance: Acceptance = "exact", copy: bool = False
) -> _hydra.Hydra:
    """Medusa's heads, told the tokens in front of theirs (`hydra`); arguments as for `medusa`."""
    spec = spec_of(heads, _hydra.HydraSpec)
    return _hydra.make(spec, heads, tree=tree, acceptance=acceptance, copy=copy)


def hidden_transfer(
    heads: Heads,
    tree: str = "auto",
    pseudo: _hidden_transfer.Schedule = "accepted",
    acceptance: Acceptance = "exact",
    copy: bool = False,
) -> _hidden_transfer.HiddenTransfer:
    """Rows of tokens to come, made half way up the layers (`hidden_transfer`).

    Args:
      heads: from `load_heads`.
      tree: as for `medusa`.
      pseudo: `all`: every node of a tree carries its pseudo rows through the pass that verifies it;
        `accepted`: those of the last node that was kept pass the upper layers afterwards.
      acceptance: `exact`, or `typical`, which keeps what is likely enough (lossy).
      copy: as for `medusa`.
    """
    spec = spec_of(heads, HiddenTransferSpec)
    return _hidden_transfer.make(
        spec, heads, tree=tree, pseudo=pseudo, acceptance=acceptance, copy=copy
    )


def cp(
    heads: Heads, tree: str = "auto", acceptance: _cp.Acceptance = "exact", copy: bool = False
) -> _cp.CP:
    """Heads that foretell the next tokens jointly, as a mixture (`cp`).

    Args:
      heads: from `load_heads`.
      tree: as for `medusa`, but a chain aside it says only how many drafts and how deep: they stand
        on the likeliest paths, which form another tree in every step (with `rejection`: on it).
      acceptance: `exact`: drafts are kept where the model draws the same; `rejection`: drafts
        are drawn from the mixture, siblings without replacement, each kept with probability
        min(1, p / q), lossless too; `typical`: what is likely enough (lossy).
      copy: as for `medusa`; not with `rejection`.
    """
    spec = spec_of(heads, CPSpec)
    return _cp.make(spec, heads, tree=tree, acceptance=acceptance, copy=copy)


def independent_heads(
    heads: Heads, tree: str = "auto", acceptance: Acceptance = "exact", copy: bool = False
) -> _independent.IndependentHeads:
    """Layers beside the last one that guess the tokens behind the next (`independent_heads`).

    Args:
      heads: from `load_heads`.
      tree: as for `medusa`.
      acceptance: `exact`, or `typical`, which keeps what is likely enough (lossy).
      copy: as for `medusa`.
    """
    spec = spec_of(heads, IndependentHeadsSpec)
    return _independent.make(spec, heads, tree=tree, acceptance=acceptance, copy=copy)


METHODS: Mapping[str, Callable[..., Method]] = MappingProxyType(
    {
        Autoregressive.name: autoregressive,
        CPSpec.name: cp,
        DMTD.name: dmtd,
        IndependentHeadsSpec.name: independent_heads,
        NGram.name: ngram,
        PromptLookup.name: prompt_lookup,
        SelfSpeculative.name: self_speculative,
        _medusa.MedusaSpec.name: medusa,
        _hydra.HydraSpec.name: hydra,
        HiddenTransferSpec.name: hidden_transfer,
    }
)
SPECS: Mapping[str, type[HeadsSpec]] = MappingProxyType(
    {
        CPSpec.name: CPSpec,
        IndependentHeadsSpec.name: IndependentHeadsSpec,
        _medusa.MedusaSpec.name: _medusa.MedusaSpec,
        _hydra.HydraSpec.name: _hydra.HydraSpec,
        HiddenTransferSpec.name: HiddenTransferSpec,
    }
)
"""Methods with trained weights, which a factory takes as `heads`; each has the option `tree`, which
takes `chain`."""


def reference(method: Method) -> Method:
    """Whose greedy tokens a lossless method emits: plain decoding, mostly (`Method.plain`)."""
    return method.plain() or autoregressive()


def make_method(name: str, options: Mapping[str, Any], heads: Heads | None = None) -> Method:
    """The method of that name with these options; values may be text, as on the command line.

    Args:
      heads: weights of the method, whose options come first; for methods of `SPECS` alone.

    Raises:
      InputError: an unknown method or option (the nearest known one is named), a wrong value, no
        heads where there must be some, or another value than the heads were trained with.
    """
    typed = typed_options(name, options)
    if name not in SPECS:
        return METHODS[name](**typed)
    if heads is None:
        raise InputError(f"method '{name}' needs trained heads")
    if heads.method != name:
        raise InputError(f"these heads are for method '{heads.method}', not '{name}'")
    if (key := trained_otherwise(name, heads.options, typed)) is not None:
        raise InputError(f"{key} of '{name}' is what the heads were trained with")
    own = [field.name for field in dataclasses.fields(SPECS[name])]
    both = {**typed_options(name, heads.options), **typed}
    return METHODS[name](heads=heads, **{k: v for k, v in both.items() if k not in own})


def trained_otherwise(
    name: str, trained: Mapping[str, Any], options: Mapping[str, Any]
) -> str | None:
    """The first of the options of which heads were trained with another value; None: there is none.

    Args:
      trained: the options that are kept with the heads.
    """
    if name not in SPECS:
        return None
    spec = dataclasses.asdict(make_spec(name, trained))
    typed = typed_options(name, options)
    return next((key for key in spec if key in typed and typed[key] != spec[key]), None)


def trained_options(name: str, config: ModelConfig) -> dict[str, Any]:
    """What the weights say of how a method decodes with them, in front of all other options."""
    if name != DMTD.name or config.cycles is None:
        return {}
    return {"cycle": config.cycles.cycle}


def typed_options(name: str, options: Mapping[str, Any]) -> dict[str, Any]:
    """Options of a method, those of its heads among them, each of the kind that it must be.

    Raises:
      InputError: an unknown method or option, or a wrong value.
    """
    if name not in METHODS:
        raise unknown_name("method", name, METHODS)
    known = typing.get_type_hints(METHODS[name])
    for internal in ("return", "heads"):
        known.pop(internal, None)
    if name in SPECS:
        kind = SPECS[name]
        hints = typing.get_type_hints(kind)
        known |= {field.name: hints[field.name] for field in dataclasses.fields(kind)}
    return read_options(name, known, options)


def make_spec(name: str, options: Mapping[str, Any]) -> HeadsSpec:
    """What the weights of a method of `SPECS` are; options of its decoding are left out.

    Raises:
      InputError: as for `typed_options`.
    """
    kind = SPECS[name]
    typed = typed_options(name, options)
    own = [field.name for field in dataclasses.fields(kind)]
    return kind(**{key: value for key, value in typed.items() if key in own})


def spec_of(heads: Heads, kind: type[Spec]) -> Spec:
    """The spec that heads were trained with, for the factory of a method.

    Raises:
      InputError: they are no heads, or those of another method.
    """
    if not isinstance(heads, Heads):
        raise InputError("heads must be loaded: mtd.load_heads(directory, model)")
    if heads.method not in SPECS or SPECS[heads.method] is not kind:
        raise InputError(f"these heads are for method '{heads.method}'")
    found = make_spec(heads.method, heads.options)
    assert isinstance(found, kind)
    return found


def _copying(
    kind: Callable[..., Any], drafts: Drafts, longest: int, branches: str, acceptance: Acceptance
) -> Any:
    if not 1 <= longest <= _LONGEST_MATCH:
        raise InputError(f"longest must be between 1 and {_LONGEST_MATCH}, got {longest}")
    if branches:
        if drafts != "auto":
            raise InputError("give drafts or branches, not both: branches say how many there are")
        tree = TokenTree.branching(*(typed_value("branches", int, w) for w in branches.split("x")))
        sizes: tuple[int, ...] = (1, tree.size)
    elif drafts == "auto":
        sizes = backend.step_sizes()
        tree = TokenTree.chain(sizes[-1] - 1)
    else:
        if not 0 <= drafts < MAX_NODES:
            raise InputError(f"drafts must be between 0 and {MAX_NODES - 1}, got {drafts}")
        tree = TokenTree.chain(drafts)
        sizes = (1, tree.size) if drafts else (1,)
    auto = drafts == "auto" and not branches
    # If not: as many as asked for, wherever there is anything to verify.
    costs = [backend.relative_step_cost(size) if auto else 1.0 for size in sizes]
    return kind(
        costs=jnp.asarray(costs, jnp.float32),
        auto=auto,
        tree=tree,
        sizes=sizes,
        longest=longest,
        acceptance=acceptance,
    )
