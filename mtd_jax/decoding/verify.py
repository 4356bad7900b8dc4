"""Which drafts are kept: pure array code in float32 that knows nothing of models.

All rules but `typical` are lossless: what comes out is distributed exactly as if the model had
decoded one token at a time.

- `walk`: drafts that are what they are (guesses from the text, the likeliest tokens of a head). At
  every node a token is drawn from the model, greedily or not; where it is one of the node's
  children, verification goes on there. Chains and trees.
- `rejection`: a chain whose tokens were drawn from a distribution q (arXiv 2211.17192, 2302.01318).
- `siblings`: a tree whose siblings were drawn without replacement from a q (arXiv 2305.09781's
  multi-step rule).
- `typical`: keeps what is likely enough (arXiv 2401.10774, section 2.3.1). Lossy.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from flax import struct

from mtd_jax.decoding.row_trees import AnyTree, in_rows
from mtd_jax.decoding.sampling import typed
from mtd_jax.decoding.tree import TokenTree
from mtd_jax.typing import Array, Bool, Float, Int, Leaf, UInt32

TYPICAL_EPSILON = 0.09
TYPICAL_DELTA = 0.3

_NO_TOKEN = -1
_TEST, _RESIDUAL = 1, 2
"""Uses of a position's key (`sampling.typed`)."""


class Verdict(struct.PyTreeNode):
    """What a verification keeps of each row's drafts."""

    path: Leaf
    """[B, depth + 1] int32: nodes from the root to the last one kept, which then repeats."""
    accepted: Leaf
    """[B] int32: drafts kept."""
    tokens: Leaf
    """[B, depth + 1] int32: the drafts kept and the bonus token behind them; the rest is noise."""


def walk(tree: AnyTree, drafts: Int[Array, "B M"], drawn: Int[Array, "B M"]) -> Verdict:
    """Follows the tokens that the model draws through the tree.

    Args:
      drafts: the tokens on the tree; the root's is not looked at, -1 is no draft.
      drawn: at each node, a token from the model's distribution of what follows it.
    """
    above = jnp.take_along_axis(drawn, in_rows(tree).parents, axis=1)
    matches = (drafts == above) & (drafts != _NO_TOKEN)
    path, accepted = _deepest(tree, matches)
    return Verdict(path=path, accepted=accepted, tokens=jnp.take_along_axis(drawn, path, axis=1))


def typical(
    tree: AnyTree,
    drafts: Int[Array, "B M"],
    drawn: Int[Array, "B M"],
    log_p: Float[Array, "B M V"],
) -> Verdict:
    """Keeps the longest way of drafts that are typical; the bonus token is drawn. Lossy.

    A draft x is kept if p(x) > min(epsilon, delta exp(-H(p))), where H is the entropy of the
    model's distribution p at its parent: the surer the model, the stricter the test. Where
    probabilities are one-hot (temperature 0) this is `walk`.
    """
    parents = in_rows(tree).parents
    # -inf * 0 is NaN: a token without probability adds nothing to the entropy.
    plogp = jnp.where(jnp.isfinite(log_p), jnp.exp(log_p) * log_p, 0.0)
    threshold = jnp.minimum(TYPICAL_EPSILON, TYPICAL_DELTA * jnp.exp(jnp.sum(plogp, axis=-1)))
    asked = jnp.maximum(drafts, 0)[:, :, None]
    above = jnp.take_along_axis(log_p, parents[:, :, None], axis=1)
    p_draft = jnp.exp(jnp.take_along_axis(above, asked, axis=-1))[..., 0]
    strict = jnp.take_along_axis(threshold, parents, axis=1)
    kept = (p_draft > strict) & (drafts != _NO_TOKEN)
    path, accepted = _deepest(tree, kept)
    # Drafts as they are, then the draw at the last node.
    below = jnp.take_along_axis(drafts, jnp.roll(path, -1, axis=1), axis=1)
    bonus = jnp.take_along_axis(drawn, path[:, -1:], axis=1)
    index = jnp.arange(path.shape[1], dtype=jnp.int32)[None, :]
    tokens = jnp.where(index < accepted[:, None], below, bonus)
    return Verdict(path=path, accepted=accepted, tokens=tokens)


def rejection(
    drafts: Int[Array, "B T"],
    count: Int[Array, " B"],
    log_q: Float[Array, "B T V"],
    log_p: Float[Array, "B rows V"],
    keys: UInt32[Array, "B rows 2"],
) -> Verdict:
    """A chain of drafts that were drawn from q: token by token with probability min(1, p / q).

    The first one refused is replaced by a draw from norm(max(0, p - q)); behind the last one stands
    a draw from p.

    Args:
      drafts: of which the first `count` of a row are real.
      log_q: the float32 distribution that each draft was drawn from, no other.
      log_p: the model's distributions at the root and behind every draft; rows = T + 1.
      keys: data of a key for each position to be filled, shared with nobody but `sample`.
    """
    depth = drafts.shape[1]
    index = jnp.arange(depth, dtype=jnp.int32)[None, :]
    chosen = jnp.maximum(drafts, 0)[:, :, None]
    ratio = jnp.take_along_axis(log_p[:, :depth] - log_q, chosen, axis=-1)[..., 0]
    uniform = jax.vmap(jax.vmap(lambda k: jax.random.uniform(typed(k, _TEST))))(keys[:, :depth])
    passed = (jnp.log(uniform) < ratio) & (index < count[:, None])
    accepted = jnp.sum(jnp.cumprod(passed.astype(jnp.int32), axis=1), axis=1)

    at = accepted[:, None, None]
    p = jnp.exp(jnp.take_along_axis(log_p, at, axis=1)[:, 0])
    refused = jnp.minimum(at, depth - 1)
    q = jnp.exp(jnp.take_along_axis(log_q, refused, axis=1)[:, 0])
    q = jnp.where((accepted < count)[:, None], q, 0.0)
    key = jnp.take_along_axis(keys, at, axis=1)[:, 0]
    bonus = _draw(_residual(p, q), key)

    path = jnp.minimum(jnp.arange(depth + 1, dtype=jnp.int32)[None, :], accepted[:, None])
    padded = jnp.pad(drafts, ((0, 0), (0, 1)))
    here = jnp.arange(depth + 1, dtype=jnp.int32)[None, :]
    tokens = jnp.where(here < accepted[:, None], padded, bonus[:, None])
    return Verdict(path=path, accepted=accepted, tokens=tokens)


def siblings(
    tree: TokenTree,
    drafts: Int[Array, "B M"],
    log_q: Float[Array, "B inner V"],
    log_p: Float[Array, "B M V"],
    keys: UInt32[Array, "B M 2"],
) -> Verdict:
    """A tree whose siblings were drawn without replacement (`draw_siblings`).

    The children of a node are tried in turn: the first with probability min(1, p / q); after a
    refusal p becomes norm(max(0, p - q)), and q loses the refused token. If none is kept, the token
    is drawn from what is left of p.

    Args:
      drafts: -1 is none.
      log_q: at each node that has children, the distribution that these were drawn from; nodes
        are numbered by depth, so the deepest ones may be left out.
      keys: a key for each node, shared with nobody but `sample`.
    """
    batch = drafts.shape[0]
    rows = jnp.arange(batch, dtype=jnp.int32)
    node = jnp.zeros(batch, jnp.int32)
    going = jnp.ones(batch, jnp.bool)
    accepted = jnp.zeros(batch, jnp.int32)
    nodes, tokens = [node], []
    p = jnp.exp(log_p[:, 0])
    for depth in range(tree.max_depth):
        here, node_p = node, p
        q = jnp.exp(log_q[rows, here])
        kept = jnp.zeros(batch, jnp.bool)
        for rank in range(_widest(tree, depth)):
            child = _child_table(tree)[rank][here]
            offered = going & ~kept & (child > 0) & (drafts[rows, child] >= 0)
            token = jnp.maximum(drafts[rows, child], 0)
            key = keys[rows, here]
            uniform = jax.vmap(lambda k, r=rank: jax.random.uniform(typed(k, _TEST, r)))(key)
            # q may know fewer tokens than there are children: the others were not drawn from it.
            known = q[rows, token] > 0
            passed = offered & known & (uniform * q[rows, token] < node_p[rows, token])
            node = jnp.where(passed, child, node)
            kept = kept | passed
            refused = (offered & ~passed)[:, None]
            node_p = jnp.where(refused, _residual(node_p, q), node_p)
            q = jnp.where(refused, _normalised(q.at[rows, token].set(0.0)), q)
        going = going & kept
        accepted = accepted + going.astype(jnp.int32)
        p = jnp.where(going[:, None], jnp.exp(log_p[rows, node]), node_p)
        nodes.append(node)
        tokens.append(jnp.where(going, drafts[rows, node], 0))
    bonus = _draw(p, keys[rows, node])
    index = jnp.arange(tree.max_depth + 1, dtype=jnp.int32)[None, :]
    kept_tokens = jnp.stack([*tokens, jnp.zeros(batch, jnp.int32)], axis=1)
    return Verdict(
        path=jnp.stack(nodes, axis=1),
        accepted=accepted,
        tokens=jnp.where(index < accepted[:, None], kept_tokens, bonus[:, None]),
    )


def draw_siblings(
    log_q: Float[Array, "B V"], keys: UInt32[Array, "B 2"], count: int
) -> Int[Array, "B count"]:
    """`count` different tokens drawn one after the other without replacement (Gumbel top-k)."""
    noise = jax.vmap(lambda k: jax.random.gumbel(typed(k, 0), log_q.shape[-1:], jnp.float32))(keys)
    return jax.lax.top_k(log_q + noise, count)[1].astype(jnp.int32)


def _deepest(tree: AnyTree, kept: Bool[Array, "B M"]) -> tuple[jax.Array, jax.Array]:
    """Path and depth of the deepest node that is kept with all its ancestors."""
    rows = in_rows(tree)
    kept = kept.at[:, 0].set(True)  # the root is in the text already
    alive = jnp.all(kept[:, None, :] | ~rows.ancestors, axis=-1)
    last = jnp.argmax(jnp.where(alive, rows.depth, -1), axis=1)[:, None]
    path = jnp.take_along_axis(rows.paths, last[:, :, None], axis=1)[:, 0]
    return path, jnp.take_along_axis(rows.depth, last, axis=1)[:, 0]


def _widest(tree: TokenTree, depth: int) -> int:
    """The most children that a node at `depth` has."""
    return max(len(tree.children(n)) for n in range(tree.size) if tree.depth[n] == depth)


@functools.cache
def _children(tree: TokenTree) -> tuple[tuple[int, ...], ...]:
    width = max((len(tree.children(n)) for n in range(tree.size)), default=0)
    return tuple(
        tuple((tree.children(n) + (0,) * width)[rank] for n in range(tree.size))
        for rank in range(width)
    )


def _child_table(tree: TokenTree) -> jax.Array:
    """[ranks, M] int32: the child of that rank; 0 where there is none."""
    return jnp.asarray(_children(tree), jnp.int32)


def _residual(p: jax.Array, q: jax.Array) -> jax.Array:
    """norm(max(0, p - q)) over the last axis; p itself where nothing is left (p = q)."""
    rest = jnp.maximum(p - q, 0.0)
    total = jnp.sum(rest, axis=-1, keepdims=True)
    return jnp.where(total > 0, rest / jnp.where(total > 0, total, 1.0), p)


def _normalised(q: jax.Array) -> jax.Array:
    total = jnp.sum(q, axis=-1, keepdims=True)
    return q / jnp.where(total > 0, total, 1.0)


def _draw(p: jax.Array, keys: jax.Array) -> jax.Array:
    """A token from each row of probabilities."""

    def noise(key: jax.Array) -> jax.Array:
        return jax.random.gumbel(typed(key, _RESIDUAL), p.shape[-1:], jnp.float32)

    return jnp.argmax(jnp.log(p) + jax.vmap(noise)(keys), axis=-1).astype(jnp.int32)
