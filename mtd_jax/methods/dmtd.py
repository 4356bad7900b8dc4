"""Direct Multi-Token Decoding: cycles in which most tokens run through the late layers alone.

Luo, Wang, Yan, arXiv 2510.11958. The layers fall into E early, M middle and D late ones. The first
token of a cycle, its head, passes all of them; what reaches the late layers is

    late_in = early + head * middle        early, middle: what the groups put out; head: 0 or 1

so the other tokens of a cycle cost the early and late layers only (E is 0 as published). Their rows
in the middle layers are made up for when the next head comes, in one block with it: the weights are
read once a cycle ("cyclical refilling"). A cycle of four behind a prompt of six, E = 0:

    position       6  7  8  9   10 11 12 13
    late layers    h  .  .  .    h  .  .  .     one row at a time
    middle layers  6            7-10            one block at every head

The network is fine-tuned to stand this; nothing is verified, so it is lossy. With `lossless`, the
late-only rows are drafts, and all rows as heads verify them: the tokens are those of cycle 1.
"""

from __future__ import annotations

from typing import Any, ClassVar, Literal

import jax
import jax.numpy as jnp
from flax import struct

from mtd_jax.config import Anchor, CycleConfig, ModelConfig
from mtd_jax.decoding.base_method import BaseMethod
from mtd_jax.decoding.draft_chain import draw_chain
from mtd_jax.decoding.method import DecodeState, Requests
from mtd_jax.decoding.penalties import penalized
from mtd_jax.decoding.prompt import read_prompt
from mtd_jax.decoding.sampling import sample
from mtd_jax.decoding.speculative import verify_draws
from mtd_jax.decoding.traffic import weight_bytes
from mtd_jax.errors import InputError
from mtd_jax.methods.cycles import late_in
from mtd_jax.transformer.cache import KVCache
from mtd_jax.transformer.model import Parameters, embed, rows_behind, unembed
from mtd_jax.transformer.stack import Rows, Skip, decode_range
from mtd_jax.typing import Array, Bool, Float, Int, Leaf

DEFAULT_LATE = 8


class _Refill(struct.PyTreeNode):
    """What the middle layers have not seen yet."""

    waiting: Leaf
    """[B, cycle, D]: early layers' output at the positions from `middle_length` on."""
    middle_length: Leaf
    """[B] int32: positions whose keys and values are in the middle layers' cache."""
    cycle: Leaf
    """[B] int32: tokens of each row's cycle."""


class DMTD(BaseMethod):
    """See the module's docstring; made by `methods.dmtd`."""

    cycle: int = struct.field(pytree_node=False)
    """Tokens of a cycle; prompts may ask for fewer."""
    early: int | None = struct.field(pytree_node=False, default=None)
    """E; None: what the weights were trained for, else 0."""
    late: int | None = struct.field(pytree_node=False, default=None)
    """D; None: what the weights were trained for, else 8."""
    anchor: Anchor | None = struct.field(pytree_node=False, default=None)
    """Where cycles start; None: as the weights were trained, else behind the prompt."""
    lossless: bool = struct.field(pytree_node=False, default=False)
    """Verify: the tokens are those of cycle 1."""

    name: ClassVar[str] = "dmtd"
    has_cycles: ClassVar[bool] = True

    @property
    def max_emit(self) -> int:
        """A whole cycle."""
        return self.cycle

    def partial_bytes(self, params: Parameters, cached: float) -> float:
        """Early and late layers, their keys and values, and the output head."""
        groups, layers = self.groups(params.config), params.config.num_layers
        middle = frozenset(range(groups.early, layers - groups.late))
        kept = (groups.early + groups.late) / layers
        return weight_bytes(params, Skip(attention=middle, mlp=middle)) + kept * cached

    def groups(self, config: ModelConfig) -> CycleConfig:
        """E, D, cycle and anchor for these weights, all of them known."""
        trained = config.cycles
        early, late, anchor = self.early, self.late, self.anchor
        if early is None:
            early = 0 if trained is None else trained.early
        if late is None:
            late = DEFAULT_LATE if trained is None else trained.late
        if anchor is None:
            anchor = "prompt" if trained is None or trained.anchor is None else trained.anchor
        return CycleConfig(early=early, late=late, cycle=self.cycle, anchor=anchor)

    def check(self, config: ModelConfig, cycles: frozenset[int]) -> str | None:
        """Refuses other groups or another anchor than the weights were trained for."""
        groups, trained = self.groups(config), config.cycles
        if groups.early + groups.late >= config.num_layers:
            raise InputError(
                f"{groups.early} early and {groups.late} late layers leave no middle one of "
                f"{config.num_layers}: give --option late=..."
            )
        if cycles and max(cycles) > self.cycle:
            raise InputError(
                f"a prompt asks for a cycle of {max(cycles)}, the method's is {self.cycle}"
            )
        if trained is None:
            return (
                "these weights were not trained for cycles: speed can be measured, what they say "
                "makes no sense (train them: mtd train configs/dmtd/...)"
            )
        for name in ("early", "late", "anchor"):
            asked, known = getattr(groups, name), getattr(trained, name)
            if known is not None and asked != known:
                raise InputError(f"the weights were trained with {name} = {known}, not {asked}")
        others = {self.cycle, *cycles} - {trained.cycle}
        if others and not self.lossless:
            return f"these weights were trained for cycles of {trained.cycle}, not {min(others)}"
        if trained.anchor is None and self.anchor is None:
            return (
                "the checkpoint does not say where its cycles start: taken to be behind the prompt "
                "(else: --option anchor=sequence)"
            )
        return None

    def plain(self) -> DMTD:
        """Cycles of one: late layers that get a sum are another model than plain ones."""
        return self.replace(cycle=1, lossless=False)

    def read(
        self,
        params: Parameters,
        tokens: Int[Array, "B P"],
        lengths: Int[Array, " B"],
        requests: Requests,
        capacity: int,
    ) -> tuple[Float[Array, "B D"], KVCache]:
        """The prompts as plain rows, or in cycles, where those start with the text."""
        if self.groups(params.config).anchor == "prompt":
            return read_prompt(params, tokens, lengths, capacity)

        def in_cycles(
            params: Parameters,
            cache: KVCache,
            tokens: jax.Array,
            *,
            context: jax.Array,
            cycle: jax.Array,
        ) -> tuple[jax.Array, KVCache]:
            order = jnp.arange(tokens.shape[1], dtype=jnp.int32)[None, :]
            places = (cache.length[:, None] + order) % cycle[:, None]
            places = jnp.zeros_like(places) if self.lossless else places
            return self._walk(params, cache, tokens, places, context=context)

        cycle = self._cycles(requests)
        return read_prompt(params, tokens, lengths, capacity, in_cycles, cycle=cycle)

    def kept(
        self,
        params: Parameters,
        last: Float[Array, "B D"],
        cache: KVCache,
        requests: Requests,
    ) -> _Refill:
        """Nothing waits for the middle layers: they have seen the prompts."""
        waiting = jnp.zeros((last.shape[0], self.cycle, last.shape[1]), last.dtype)
        return _Refill(waiting=waiting, middle_length=cache.length, cycle=self._cycles(requests))

    def _cycles(self, requests: Requests) -> Int[Array, " B"]:
        """Tokens of each row's cycle."""
        own = jnp.full(requests.budget.shape, self.cycle, jnp.int32)
        if requests.cycle is None:
            return own
        return jnp.where(requests.cycle > 0, requests.cycle, own)

    def step(self, params: Parameters, state: DecodeState) -> DecodeState:
        """One cycle, up to the next head."""
        return self._verified(params, state) if self.lossless else self._cycle(params, state)

    def _cycle(self, params: Parameters, state: DecodeState) -> DecodeState:
        groups, refill = self.groups(params.config), state.extra
        length, batch = state.cache.length, state.pending.shape[0]
        origin = state.prompt_length if groups.anchor == "prompt" else jnp.zeros_like(length)
        # Not a head: a prompt ended inside a cycle, whose rest comes first.
        place = (length - origin) % refill.cycle
        head = place == 0
        count = refill.cycle - place

        x, cache, refill = self._enter(params, state.cache, refill, state.pending, state.active)
        middle, cache = self._refill(params, cache, refill, state.active & head)
        passed = jnp.where(state.active & head, length + 1, refill.middle_length)
        refill = refill.replace(middle_length=passed)
        x = jnp.where(head[:, None, None], x + middle, x)
        emitted = jnp.full((batch, self.cycle), -1, jnp.int32)
        token, cache = self._leave(params, state, cache, x, emitted, state.active)
        emitted = emitted.at[:, 0].set(token)

        # As long as any row needs it: the engine cuts what is behind a budget.
        wanted = jnp.minimum(count, state.requests.budget)
        limit = jnp.max(jnp.where(state.active, wanted, 0))

        def late_only(carry: Any) -> Any:
            cache, refill, emitted, done = carry
            going = state.active & (done < count)
            here = cache.replace(length=length + done)
            x, here, refill = self._enter(params, here, refill, emitted[:, done - 1], going)
            token, here = self._leave(params, state, here, x, emitted, going)
            emitted = emitted.at[:, done].set(jnp.where(going, token, -1))
            return here, refill, emitted, done + 1

        cache, refill, emitted, done = jax.lax.while_loop(
            lambda carry: carry[-1] < limit, late_only, (cache, refill, emitted, jnp.int32(1))
        )
        count = jnp.where(state.active, jnp.minimum(count, done), 0)
        last = jnp.maximum(count - 1, 0)[:, None]
        newest = jnp.take_along_axis(emitted, last, axis=1)[:, 0]
        return state.replace(
            cache=cache.replace(length=length + count),
            pending=jnp.where(state.active, newest, state.pending),
            emitted=emitted,
            emitted_count=count,
            partial=jnp.maximum(count - 1, 0),
            extra=refill,
        )

    def _enter(
        self,
        params: Parameters,
        cache: KVCache,
        refill: _Refill,
        tokens: Int[Array, " B"],
        going: Bool[Array, " B"],
    ) -> tuple[Float[Array, "B 1 D"], KVCache, _Refill]:
        """Embeds a token behind the cache and runs its early layers, for the only time."""
        rows, slots = rows_behind(params.config, cache, 1, active=going)
        x = embed(params, jnp.maximum(tokens, 0)[:, None])
        x, cache = self._through("early", params, x, cache, rows, slots)
        batch = jnp.arange(tokens.shape[0], dtype=jnp.int32)
        place = jnp.where(going, cache.length - refill.middle_length, self.cycle)
        waiting = refill.waiting.at[batch, place].set(x[:, 0], mode="drop")
        return x, cache, refill.replace(waiting=waiting)

    def _refill(
        self, params: Parameters, cache: KVCache, refill: _Refill, head: Bool[Array, " B"]
    ) -> tuple[Float[Array, "B 1 D"], KVCache]:
        """Runs the middle layers on all that waits; returns what comes out at the heads."""
        behind = cache.replace(length=refill.middle_length)
        rows, slots = rows_behind(params.config, behind, self.cycle, active=head)
        slots = jnp.where(slots <= cache.length[:, None], slots, cache.capacity)
        x, written = self._through("middle", params, refill.waiting, behind, rows, slots)
        last = jnp.clip(cache.length - refill.middle_length, 0, self.cycle - 1)
        x = jnp.take_along_axis(x, last[:, None, None], axis=1)
        return x, written.replace(length=cache.length)

    def _leave(
        self,
        params: Parameters,
        state: DecodeState,
        cache: KVCache,
        x: Float[Array, "B 1 D"],
        emitted: Int[Array, "B E"],
        going: Bool[Array, " B"],
    ) -> tuple[Int[Array, " B"], KVCache]:
        """Runs the late layers at the row behind the cache, and draws what follows it."""
        rows, slots = rows_behind(params.config, cache, 1, active=going)
        x, cache = self._through("late", params, x, cache, rows, slots)
        sampling = state.requests.sampling
        logits = penalized(unembed(params, x), sampling, state.history, emitted[:, None])[:, 0]
        return sample(logits, sampling, cache.length + 1), cache

    def _verified(self, params: Parameters, state: DecodeState) -> DecodeState:
        """Late-only rows draft; the same weights with every row a head verify."""

        def all_heads(
            params: Parameters, cache: KVCache, tokens: jax.Array, **options: Any
        ) -> tuple[jax.Array, KVCache]:
            return self._walk(params, cache, tokens, jnp.zeros_like(tokens), **options)

        if self.cycle == 1:
            none = jnp.zeros((state.pending.shape[0], 0), jnp.int32)
            log_q = jnp.zeros((*none.shape, params.config.vocab_size), jnp.float32)
            nothing = jnp.zeros_like(state.pending)
            return verify_draws(params, state, none, nothing, log_q, extend=all_heads)[0]

        def late_only(
            cache: KVCache, tokens: jax.Array, going: jax.Array
        ) -> tuple[jax.Array, KVCache]:
            return self._walk(params, cache, tokens, None, active=going)

        limit = state.extra.cycle - 1
        never = jnp.zeros(state.pending.shape, jnp.float32)
        state, drafts, count, log_q = draw_chain(
            params, state, late_only, self.cycle - 1, limit, never
        )
        state, _ = verify_draws(params, state, drafts, count, log_q, extend=all_heads)
        return state.replace(partial=count)

    def _walk(
        self,
        params: Parameters,
        cache: KVCache,
        tokens: Int[Array, "B T"],
        places: Int[Array, "B T"] | None,
        **options: Any,
    ) -> tuple[Float[Array, "B T D"], KVCache]:
        """`model.extend` for rows at these places of their cycles; None: all are late only."""
        rows, slots = rows_behind(params.config, cache, tokens.shape[1], **options)
        x, cache = self._through("early", params, embed(params, tokens), cache, rows, slots)
        if places is not None:
            middle, cache = self._through("middle", params, x, cache, rows, slots)
            x = late_in(x, middle, places)
        return self._through("late", params, x, cache, rows, slots)

    def _through(
        self,
        group: Literal["early", "middle", "late"],
        params: Parameters,
        x: Float[Array, "B T D"],
        cache: KVCache,
        rows: Rows,
        slots: Int[Array, "B T"],
    ) -> tuple[Float[Array, "B T D"], KVCache]:
        """Runs the layers of one group."""
        config, groups = params.config, self.groups(params.config)
        first_late = config.num_layers - groups.late
        layers = {
            "early": (0, groups.early),
            "middle": (groups.early, first_late),
            "late": (first_late, config.num_layers),
        }
        return decode_range(config, params.blocks, cache, x, *layers[group], rows=rows, slots=slots)
