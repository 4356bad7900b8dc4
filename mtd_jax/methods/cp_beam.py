"""The likeliest paths of a mixture: a beam over the joint, whose best nodes form a tree a row.

A path's probability is the product of its conditionals, so it never exceeds that of the path it
continues: the likeliest paths of all lengths are closed under going back, which makes them the
nodes of a tree. The sum of its nodes' probabilities is the number of drafts kept of a text that the
mixture itself would draw.

A greedy text is none such: it takes the likeliest token each time, however flat the distribution.
So the chain of the likeliest tokens always comes first, and the rest of the tree is for where the
model says otherwise.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from mtd_jax.decoding.draft_vocabulary import DraftVocabulary
from mtd_jax.decoding.row_trees import RowTrees
from mtd_jax.decoding.sampling import SamplingRows, draft_scores
from mtd_jax.methods import cp_mixture
from mtd_jax.typing import Array, Float, Int


def likeliest_paths(
    log_pi: Float[Array, "B r"],
    log_p: Float[Array, "B r steps V"],
    rows: SamplingRows,
    first: Int[Array, " B"],
    *,
    count: int,
    vocabulary: DraftVocabulary | None = None,
) -> tuple[RowTrees, Int[Array, "B count"], Float[Array, "B count"]]:
    """The likeliest paths of up to `steps` tokens, as trees of `count` + 1 nodes.

    The path of the likeliest token at each step, as long as it may be; then whatever paths have the
    greatest probabilities. Of rows that draw, a token's probability is taken together with the
    noise it will be drawn with (`sampling.draft_scores`).

    Args:
      log_pi: of the experts, behind all that is known.
      log_p: their tables of the next steps.
      first: where the first step's tokens will stand.
      vocabulary: whose columns the tables have.

    Returns:
      the trees; columns of nodes 1, 2, ..., -1 where nothing more has any probability; and their
      log-probabilities as paths, which descend from parent to child.
    """
    batch, _, steps, vocab = log_p.shape
    beam_pi = log_pi[:, None]
    beam_score = jnp.zeros((batch, 1), jnp.float32)
    # The root is path 0; paths are numbered in the order they are found, at each step the chain's
    # before all others.
    beam_path = jnp.zeros((batch, 1), jnp.int32)
    scores, ranks, columns, parents = [], [], [], []
    number = 1
    for step in range(steps):
        # A path of this length has `step` others before it that are at least as likely.
        wanted = count - step
        if wanted < 1:
            break
        width, table = beam_pi.shape[1], log_p[:, :, step]
        log_q = cp_mixture.along_paths(beam_pi, table)
        places = jnp.repeat(first + step, width)
        drawing = rows.repeat(width)
        tilted = draft_scores(log_q.reshape(batch * width, vocab), drawing, places, vocabulary)
        own = jax.nn.log_softmax(tilted, axis=-1).reshape(batch, width, vocab)
        best, column = jax.lax.top_k(own, min(wanted, vocab))
        whole = (beam_score[:, :, None] + jnp.minimum(best, 0.0)).reshape(batch, -1)
        found = jax.lax.top_k(_first_to_front(whole), min(wanted, whole.shape[1]))[1]
        score = jnp.take_along_axis(whole, found, axis=1)
        before = found // best.shape[2]
        token = jnp.take_along_axis(column.reshape(batch, -1), found, axis=1).astype(jnp.int32)
        seen = jnp.take_along_axis(table, token[:, None], axis=-1).swapaxes(1, 2)
        # Behind a path without probability nothing counts, but it must not be NaN.
        seen = jnp.where(jnp.isfinite(score)[:, :, None], seen, 0.0)
        beam_pi = jnp.take_along_axis(beam_pi, before[:, :, None], axis=1)
        beam_pi = cp_mixture.told(beam_pi, seen)[1]
        parents.append(jnp.take_along_axis(beam_path, before, axis=1))
        scores.append(score)
        ranks.append(_first_to_front(score))
        columns.append(jnp.where(jnp.isfinite(score), token, -1))
        beam_path = jnp.broadcast_to(number + jnp.arange(score.shape[1])[None, :], score.shape)
        beam_score, number = score, number + score.shape[1]
    found_all = [jnp.concatenate(x, axis=1) for x in (ranks, scores, columns, parents)]
    return _best(*found_all, count=count, steps=steps)


def _first_to_front(scores: Float[Array, "B paths"]) -> Float[Array, "B paths"]:
    """The same with the first one above all others."""
    return scores.at[:, 0].set(jnp.inf)


def _best(
    ranks: Float[Array, "B found"],
    scores: Float[Array, "B found"],
    columns: Int[Array, "B found"],
    parents: Int[Array, "B found"],
    *,
    count: int,
    steps: int,
) -> tuple[RowTrees, Int[Array, "B count"], Float[Array, "B count"]]:
    """The tree of the best paths, which are numbered from 1; a parent comes before its child.

    Equal ranks go in the order of paths (`top_k`), so a path never comes without its parent.
    """
    kept = jnp.sort(jax.lax.top_k(ranks, count)[1], axis=1)
    above = jnp.take_along_axis(parents, kept, axis=1)
    # Numbered anew: as many nodes as are kept up to the parent. The root is path 0 and node 0.
    before = kept[:, None, :] + 1 <= above[:, :, None]
    node = jnp.sum(before, axis=2, dtype=jnp.int32)
    trees = RowTrees.hung(jnp.pad(node, ((0, 0), (1, 0))), min(steps, count))
    tokens, chances = (jnp.take_along_axis(x, kept, axis=1) for x in (columns, scores))
    return trees, tokens, chances
