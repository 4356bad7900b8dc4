"""Draft & Verify (arXiv 2309.08168): the draft is the model itself with some sublayers left out.

A draft token runs through the layers that are kept, against the keys and values that the whole
model left in the cache; its own are written behind the text and overwritten when the whole model
verifies. Drafting ends behind the first token whose draft probability is under a threshold, which
follows the acceptance (the paper's section 3.4). Which sublayers to leave out is found by
`mtd tune self-speculative`.
"""

from __future__ import annotations

from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import struct

from mtd_jax.config import ModelConfig
from mtd_jax.decoding.adaptive import AcceptanceRates, best_size, urgency
from mtd_jax.decoding.base_method import BaseMethod
from mtd_jax.decoding.draft_chain import draw_chain
from mtd_jax.decoding.method import DecodeState, Requests
from mtd_jax.decoding.speculative import in_place_switch, verify_drafts, verify_draws
from mtd_jax.decoding.traffic import weight_bytes
from mtd_jax.decoding.tree import TokenTree
from mtd_jax.errors import InputError
from mtd_jax.transformer.cache import KVCache
from mtd_jax.transformer.model import Parameters, extend
from mtd_jax.transformer.stack import Skip
from mtd_jax.typing import Array, Float, Int, Leaf

_BELIEF = 4.0
"""Tries that `agreement` counts as: a text may be easier or harder than those of `mtd tune`."""
_THRESHOLD_STEP = 0.01
_THRESHOLD_SMOOTHING = 0.9
_ACCEPTANCE_SMOOTHING = 0.5


class _Adaptation(struct.PyTreeNode):
    threshold: Leaf
    """[B] float32: drafting goes on while draft probabilities reach this."""
    acceptance: Leaf
    """[B] float32: share of drafts accepted, smoothed."""
    rates: AcceptanceRates


class SelfSpeculative(BaseMethod):
    """See the module's docstring; made by `methods.self_speculative`."""

    costs: Any
    """[sizes] float32: what a step costs, drafts included, in any unit."""
    threshold: Any
    """[] float32: where each row's threshold starts; 0 never ends a draft early."""
    agreement: Any
    """[] float32: share of drafts that is taken to be right before any were tried."""
    skip: Skip = struct.field(pytree_node=False)
    sizes: tuple[int, ...] = struct.field(pytree_node=False)
    """Rows that verification may have: one more than drafts."""
    target_acceptance: float = struct.field(pytree_node=False, default=0.9)
    auto: bool = struct.field(pytree_node=False, default=False)
    """Whether `costs` are to be measured and the number of drafts follows from them."""

    name: ClassVar[str] = "self_speculative"
    lossless: ClassVar[bool] = True

    @property
    def max_emit(self) -> int:
        """All drafts and the bonus token."""
        return self.sizes[-1]

    def partial_bytes(self, params: Parameters, cached: float) -> float:
        """All weights, keys and values but those of the sublayers left out."""
        kept = 1 - len(self.skip.attention) / params.config.num_layers
        return weight_bytes(params, self.skip) + kept * cached

    def check(self, config: ModelConfig, cycles: frozenset[int]) -> str | None:
        """Needs the layers that it leaves out."""
        for layer in self.skip.attention | self.skip.mlp:
            if layer >= config.num_layers:
                last = config.num_layers - 1
                raise InputError(f"cannot skip layer {layer}: the model has layers 0..{last}")
        return super().check(config, cycles)

    def kept(
        self,
        params: Parameters,
        last: Float[Array, "B D"],
        cache: KVCache,
        requests: Requests,
    ) -> _Adaptation:
        """Thresholds and rates before anything is known."""
        batch = last.shape[0]
        return _Adaptation(
            threshold=jnp.broadcast_to(self.threshold, (batch,)),
            acceptance=jnp.full(batch, self.target_acceptance, jnp.float32),
            rates=AcceptanceRates.empty(batch, self.agreement[None], belief=_BELIEF),
        )

    def step(self, params: Parameters, state: DecodeState) -> DecodeState:
        """Drafts until no row is sure any more, then verifies."""
        adaptation: _Adaptation = state.extra
        kinds = jnp.zeros((state.pending.shape[0], self.sizes[-1] - 1), jnp.int32)
        most = jnp.minimum(state.useful_drafts, self.sizes[-1] - 1)
        weight = urgency(state.active, state.requests.budget)
        chances = adaptation.rates.of(kinds)
        chosen = best_size(self.sizes, self.costs, chances, most, weight)
        limit = jnp.asarray(self.sizes, jnp.int32)[chosen] - 1

        def plain(state: DecodeState) -> DecodeState:
            nothing = jnp.zeros((state.pending.shape[0], 0), jnp.int32)
            state, _ = verify_drafts(params, state, TokenTree.chain(0), nothing)
            return state.replace(partial=jnp.zeros_like(state.partial))

        def drafted(state: DecodeState) -> DecodeState:
            return self._drafted(params, state, limit)

        branches = (plain, drafted) if self.sizes[0] == 1 else (drafted,)
        index = jnp.minimum(limit, len(branches) - 1)
        state = in_place_switch(index, branches, state)
        accepted = jnp.maximum(state.emitted_count - 1, 0)
        return state.replace(extra=self._adapted(adaptation, state.drafted, accepted, kinds))

    def _drafted(
        self, params: Parameters, state: DecodeState, limit: Int[Array, ""]
    ) -> DecodeState:
        """Drafts up to `limit` tokens, and verifies in as few rows as hold them."""

        def draft(cache: KVCache, tokens: jax.Array, going: jax.Array) -> tuple[jax.Array, KVCache]:
            return extend(params, cache, tokens, active=going, skip=self.skip)

        state, drafts, count, log_q = draw_chain(
            params,
            state,
            draft,
            self.sizes[-1] - 1,
            jnp.broadcast_to(limit, state.pending.shape),
            state.extra.threshold,
        )
        sizes = [size for size in self.sizes if size > 1]
        fits = jnp.asarray(sizes, jnp.int32) > jnp.max(count)

        def with_rows(rows: int) -> Any:
            def verified(state: DecodeState) -> DecodeState:
                some = drafts[:, : rows - 1], count, log_q[:, : rows - 1]
                return verify_draws(params, state, *some)[0]

            return verified

        size = jnp.argmax(fits).astype(jnp.int32)
        state = in_place_switch(size, [with_rows(rows) for rows in sizes], state)
        return state.replace(partial=count)

    def _adapted(
        self,
        before: _Adaptation,
        drafted: Int[Array, " B"],
        accepted: Int[Array, " B"],
        kinds: Int[Array, "B drafts"],
    ) -> _Adaptation:
        share = accepted.astype(jnp.float32) / jnp.maximum(drafted, 1).astype(jnp.float32)
        smooth = _ACCEPTANCE_SMOOTHING
        acceptance = smooth * before.acceptance + (1 - smooth) * share
        up = jnp.where(acceptance <= self.target_acceptance, 1.0, -1.0)
        moved = jnp.clip(before.threshold + up * _THRESHOLD_STEP, 0.0, 1.0)
        smooth = _THRESHOLD_SMOOTHING
        threshold = smooth * before.threshold + (1 - smooth) * moved
        # A threshold of 0 was asked for and stays; rows without drafts bring no news.
        keep = (drafted == 0) | (before.threshold == 0)
        return _Adaptation(
            threshold=jnp.where(keep, before.threshold, threshold),
            acceptance=jnp.where(keep, before.acceptance, acceptance),
            rates=before.rates.after(kinds, drafted, accepted),
        )
