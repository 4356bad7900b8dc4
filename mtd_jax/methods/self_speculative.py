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

from mtd_jax.decoding.adaptive import AcceptanceRates, best_size
from mtd_jax.decoding.method import DecodeState, Requests
from mtd_jax.decoding.penalties import penalized
from mtd_jax.decoding.prompt import first_state, read_prompt
from mtd_jax.decoding.sampling import log_probabilities, sample
from mtd_jax.decoding.speculative import in_place_switch, verify_drafts, verify_draws
from mtd_jax.decoding.traffic import weight_bytes
from mtd_jax.decoding.tree import TokenTree
from mtd_jax.errors import InputError
from mtd_jax.transformer.model import Parameters, extend, unembed
from mtd_jax.transformer.stack import Skip
from mtd_jax.typing import Array, Bool, Float, Int, Leaf

_THRESHOLD_STEP = 0.01
_THRESHOLD_SMOOTHING = 0.9
_ACCEPTANCE_SMOOTHING = 0.5


class _Adaptation(struct.PyTreeNode):
    threshold: Leaf
    """[B] float32: drafting goes on while draft probabilities reach this."""
    acceptance: Leaf
    """[B] float32: share of drafts accepted, smoothed."""
    rates: AcceptanceRates


class SelfSpeculative(struct.PyTreeNode):
    """See the module's docstring; made by `methods.self_speculative`."""

    costs: Any
    """[sizes] float32: what a step costs, drafts included, in any unit."""
    threshold: Any
    """[] float32: where each row's threshold starts; 0 never ends a draft early."""
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

    @property
    def rows_per_step(self) -> int:
        """Drafts and the pending token."""
        return self.sizes[-1]

    def draft_bytes(self, params: Parameters) -> int:
        """All weights but those of the sublayers left out."""
        return weight_bytes(params, self.skip)

    def prefill(
        self,
        params: Parameters,
        tokens: Int[Array, "B P"],
        lengths: Int[Array, " B"],
        requests: Requests,
        capacity: int,
    ) -> DecodeState:
        """Reads the prompts and draws the first token of each."""
        layers = params.config.num_layers
        for layer in self.skip.attention | self.skip.mlp:
            if layer >= layers:
                raise InputError(f"cannot skip layer {layer}: the model has layers 0..{layers - 1}")
        last, cache = read_prompt(params, tokens, lengths, capacity)
        batch = tokens.shape[0]
        adaptation = _Adaptation(
            threshold=jnp.broadcast_to(self.threshold, (batch,)),
            acceptance=jnp.full(batch, self.target_acceptance, jnp.float32),
            rates=AcceptanceRates.empty(batch, 1),
        )
        return first_state(params, last, cache, tokens, requests, self.max_emit, adaptation)

    def step(self, params: Parameters, state: DecodeState) -> DecodeState:
        """Drafts until no row is sure any more, then verifies."""
        adaptation: _Adaptation = state.extra
        kind = jnp.zeros_like(state.pending)
        rate = adaptation.rates.of(kind)
        most = jnp.full_like(kind, self.sizes[-1] - 1)
        chosen = best_size(self.sizes, self.costs, rate, most, state.active)
        limit = jnp.asarray(self.sizes, jnp.int32)[chosen] - 1

        def plain(state: DecodeState) -> DecodeState:
            nothing = jnp.zeros((state.pending.shape[0], 0), jnp.int32)
            return verify_drafts(params, state, TokenTree.chain(0), nothing)

        def drafted(state: DecodeState) -> DecodeState:
            return self._drafted(params, state, limit)

        branches = (plain, drafted) if self.sizes[0] == 1 else (drafted,)
        index = jnp.minimum(limit, len(branches) - 1)
        state = in_place_switch(index, branches, state)
        accepted = jnp.maximum(state.emitted_count - 1, 0)
        return state.replace(extra=self._adapted(adaptation, state.drafted, accepted, kind))

    def _drafted(
        self, params: Parameters, state: DecodeState, limit: Int[Array, ""]
    ) -> DecodeState:
        """Drafts up to `limit` tokens, and verifies in as few rows as hold them."""
        state, drafts, count, log_q = self._draft(params, state, limit)
        sizes = [size for size in self.sizes if size > 1]
        fits = jnp.asarray(sizes, jnp.int32) > jnp.max(count)

        def with_rows(rows: int) -> Any:
            def verified(state: DecodeState) -> DecodeState:
                return verify_draws(
                    params, state, drafts[:, : rows - 1], count, log_q[:, : rows - 1]
                )

            return verified

        size = jnp.argmax(fits).astype(jnp.int32)
        return in_place_switch(size, [with_rows(rows) for rows in sizes], state)

    def _draft(
        self, params: Parameters, state: DecodeState, limit: Int[Array, ""]
    ) -> tuple[DecodeState, Int[Array, "B drafts"], Int[Array, " B"], Float[Array, "B drafts V"]]:
        """Up to `limit` drafts of each row, how many there are, and what they were drawn from."""
        batch, most = state.pending.shape[0], self.sizes[-1] - 1
        vocab, length = params.config.vocab_size, state.cache.length
        sampling = state.requests.sampling
        threshold = state.extra.threshold
        any_sampled = jnp.any(sampling.temperature > 0)

        def unfinished(carry: Any) -> Bool[Array, ""]:
            _, _, _, _, going, done = carry
            return (done < limit) & jnp.any(going)

        def draft(carry: Any) -> Any:
            cache, drafts, count, log_q, going, done = carry
            newest = jnp.where(done > 0, drafts[:, jnp.maximum(done - 1, 0)], state.pending)
            here = cache.replace(length=length + done)
            x, written = extend(params, here, newest[:, None], active=going, skip=self.skip)
            logits = penalized(unembed(params, x), sampling, state.history, drafts[:, None])[:, 0]
            token = sample(logits, sampling, length + done + 1)
            # Only draws need it later; a branch, because it is a pass over the vocabulary.
            q = jax.lax.cond(
                any_sampled,
                lambda: log_probabilities(logits, sampling),
                lambda: jnp.zeros((batch, vocab), jnp.float32),
            )
            drafts = drafts.at[:, done].set(jnp.where(going, token, -1))
            chosen = jnp.take_along_axis(logits, token[:, None], axis=1)[:, 0]
            sure = jnp.exp(chosen - jax.nn.logsumexp(logits, axis=-1)) >= threshold
            return (
                written,
                drafts,
                count + going.astype(jnp.int32),
                log_q.at[:, done].set(q),
                going & sure,
                done + 1,
            )

        start = (
            state.cache,
            jnp.full((batch, most), -1, jnp.int32),
            jnp.zeros(batch, jnp.int32),
            jnp.zeros((batch, most, vocab), jnp.float32),
            state.active,
            jnp.int32(0),
        )
        cache, drafts, count, log_q, _, _ = jax.lax.while_loop(unfinished, draft, start)
        return state.replace(cache=cache.replace(length=length)), drafts, count, log_q

    def _adapted(
        self,
        before: _Adaptation,
        drafted: Int[Array, " B"],
        accepted: Int[Array, " B"],
        kind: Int[Array, " B"],
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
            rates=before.rates.after(kind, drafted, accepted),
        )
