"""One step that verifies drafts: a forward pass over a tree, a verdict, what follows from it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal, TypeAlias, TypeVar

import jax
import jax.numpy as jnp
from flax import struct

from mtd_jax.decoding import verify
from mtd_jax.decoding.method import DecodeState, Extend, Output
from mtd_jax.decoding.penalties import penalized
from mtd_jax.decoding.row_trees import AnyTree, in_rows
from mtd_jax.decoding.sampling import log_probabilities, position_keys, sample
from mtd_jax.decoding.tree import TokenTree
from mtd_jax.transformer.cache import KVCache
from mtd_jax.transformer.model import Parameters, extend, unembed
from mtd_jax.typing import Array, Float, Int, Leaf

Acceptance: TypeAlias = Literal["exact", "typical"]
State = TypeVar("State")


class Pass(struct.PyTreeNode):
    """What a verifying pass computed, for methods that draft from it."""

    rows: Leaf
    """[B, M, W]: what `extend` put out at every node: the last layer's output before the final
    norm, and behind it whatever else the method wants."""
    logits: Leaf
    """[B, M, V] float32: the model's, penalties applied."""
    verdict: verify.Verdict

    @property
    def last(self) -> Int[Array, " B"]:
        """The last node that was kept; the root where no draft was."""
        path: jax.Array = self.verdict.path
        return path[:, -1]

    @property
    def last_row(self) -> Float[Array, "B W"]:
        """`rows` at the last node that was kept: the newest token of the text was drawn from it."""
        return jnp.take_along_axis(self.rows, self.last[:, None, None], axis=1)[:, 0]


def verify_drafts(
    params: Parameters,
    state: DecodeState,
    tree: AnyTree,
    drafts: Int[Array, "B drafts"],
    *,
    acceptance: Acceptance = "exact",
    extend: Extend = extend,
    output: Output = unembed,
) -> tuple[DecodeState, Pass]:
    """Verifies drafts that were not drawn at random.

    Args:
      drafts: the tokens of nodes 1, 2, ... of the tree; -1 is none.
      extend: how rows pass the layers: `model.extend`, or what a method has in its place.
      output: the same for `model.unembed`.
      acceptance: `exact`: at every node a token is drawn with the key of its position, so that what
        is emitted is what plain decoding emits, at any temperature. `typical` is lossy.
    """
    useful = in_rows(tree).depth[:, 1:] <= state.useful_drafts[:, None]
    drafts = jnp.where(useful, drafts, -1)
    on_tree = jnp.pad(drafts, ((0, 0), (1, 0)))
    x, logits, positions, cache = _target_logits(params, state, tree, on_tree, extend, output)
    batch, nodes, vocab = logits.shape
    flat = logits.reshape(batch * nodes, vocab)
    rows = state.requests.sampling.repeat(nodes)
    drawn = sample(flat, rows, positions.reshape(-1)).reshape(batch, nodes)
    if acceptance == "typical":
        log_p = log_probabilities(flat, rows).reshape(logits.shape)
        verdict = verify.typical(tree, on_tree, drawn, log_p)
    else:
        verdict = verify.walk(tree, on_tree, drawn)
    drafted = jnp.sum(drafts >= 0, axis=1, dtype=jnp.int32)
    path = None if tree.is_chain else verdict.path
    return _settled(state, cache, verdict, drafted, path), Pass(x, logits, verdict)


def verify_draws(
    params: Parameters,
    state: DecodeState,
    drafts: Int[Array, "B drafts"],
    count: Int[Array, " B"],
    log_q: Float[Array, "B inner V"],
    *,
    tree: TokenTree | None = None,
    extend: Extend = extend,
    output: Output = unembed,
) -> tuple[DecodeState, Pass]:
    """Verifies drafts that were drawn at random; greedy rows too.

    Args:
      drafts: tokens of nodes 1, 2, ... of the tree, a chain where there is none.
      count: drafts deeper than this are none.
      log_q: at every node that has children, the distribution that they were drawn from: a chain's
        draft (`verify.rejection`), or siblings without replacement (`verify.siblings`).
      extend: how rows pass the layers: `model.extend`, or what a method has in its place.
      output: the same for `model.unembed`.
    """
    tree = tree or TokenTree.chain(drafts.shape[1])
    count = jnp.minimum(count, state.useful_drafts)
    real = jnp.asarray(tree.depth)[None, 1:] <= count[:, None]
    on_tree = jnp.pad(jnp.where(real, drafts, -1), ((0, 0), (1, 0)))
    x, logits, positions, cache = _target_logits(params, state, tree, on_tree, extend, output)
    batch, nodes, vocab = logits.shape
    flat = logits.reshape(batch * nodes, vocab)
    rows = state.requests.sampling.repeat(nodes)

    def greedy() -> verify.Verdict:
        drawn = sample(flat, rows, positions.reshape(-1)).reshape(batch, nodes)
        return verify.walk(tree, on_tree, drawn)

    def sampled() -> verify.Verdict:
        log_p = log_probabilities(flat, rows).reshape(logits.shape)
        keys = position_keys(state.requests.sampling, positions)
        if tree.is_chain:
            return verify.rejection(drafts, count, log_q, log_p, keys)
        return verify.siblings(tree, on_tree, log_q, log_p, keys)

    any_sampled = jnp.any(state.requests.sampling.temperature > 0)
    verdict = jax.lax.cond(any_sampled, sampled, greedy)
    drafted = jnp.sum(on_tree[:, 1:] >= 0, axis=1, dtype=jnp.int32)
    path = None if tree.is_chain else verdict.path
    return _settled(state, cache, verdict, drafted, path), Pass(x, logits, verdict)


ONE_OF = "one_of"
"""The name in a compiled program of loops of which one runs (`evaluation.program_cost`)."""


def in_place_switch(
    index: Int[Array, ""],
    branches: Sequence[Callable[[State], State]],
    state: State,
) -> State:
    """`lax.switch` that updates the state where it lies.

    XLA copies what a conditional passes through, the whole cache each time; a while loop's carry it
    does not. So every branch is a loop that runs once or not at all.
    """
    for number, branch in enumerate(branches):

        def body(
            carry: tuple[State, jax.Array],
            branch: Callable[[State], State] = branch,
        ) -> tuple[State, jax.Array]:
            return branch(carry[0]), jnp.bool(False)

        with jax.named_scope(ONE_OF):
            state, _ = jax.lax.while_loop(lambda carry: carry[1], body, (state, index == number))
    return state


def _target_logits(
    params: Parameters,
    state: DecodeState,
    tree: AnyTree,
    on_tree: Int[Array, "B M"],
    extend: Extend = extend,
    output: Output = unembed,
) -> tuple[jax.Array, jax.Array, jax.Array, KVCache]:
    """Rows [B, M, W] and penalised logits [B, M, V] of all nodes, places [B, M] of what follows."""
    on_tree = on_tree.at[:, 0].set(state.pending)
    rows = in_rows(tree)
    ancestors = None if tree.is_chain else rows.ancestors
    tokens = jnp.maximum(on_tree, 0)
    x, cache = extend(params, state.cache, tokens, ancestors=ancestors, active=state.active)
    # The root is in the text already, and a path repeats its last node: -1 is nothing.
    places = jnp.arange(rows.paths.shape[2])[None, None, :]
    fresh = (rows.paths > 0) & (places <= rows.depth[:, :, None])
    on_way = jnp.where(fresh, jnp.take_along_axis(on_tree[:, None, :], rows.paths, axis=2), -1)
    out = output(params, x[..., : params.config.hidden_size])
    logits = penalized(out, state.requests.sampling, state.history, on_way)
    positions = state.cache.length[:, None] + 1 + rows.depth
    return x, logits, positions, cache


def _settled(
    state: DecodeState,
    cache: KVCache,
    verdict: verify.Verdict,
    drafted: Int[Array, " B"],
    path: Int[Array, "B P"] | None,
) -> DecodeState:
    count = jnp.where(state.active, verdict.accepted + 1, 0)
    newest = jnp.take_along_axis(verdict.tokens, verdict.accepted[:, None], axis=1)[:, 0]
    missing = state.emitted.shape[1] - verdict.tokens.shape[1]
    return state.replace(
        cache=cache.commit(count, path),
        pending=jnp.where(state.active, newest, state.pending),
        emitted=jnp.pad(verdict.tokens, ((0, 0), (0, missing))),
        emitted_count=count,
        drafted=drafted,
    )
