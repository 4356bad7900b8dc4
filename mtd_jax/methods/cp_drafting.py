"""Decoding with CP heads: drafts from the mixture's conditionals, exactly (arXiv 2410.17765).

The heads are evaluated once a step, at the row that the newest token was drawn from. Given that
token, the experts are weighted anew, and the tokens behind it follow one by one: along a chain; or
on the tree of the likeliest paths (`cp_beam`), another one for every text and step; or drawn, on a
tree of fixed shape. The pass that verifies them makes the next such row: none is for drafting
alone.
"""

from __future__ import annotations

from typing import ClassVar, Literal, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from mtd_jax.config import ModelConfig
from mtd_jax.decoding.draft_vocabulary import (
    DraftVocabulary,
    bytes_read,
    check_ranks,
    columns_of,
    over_all,
    reader_of,
    tokens_of,
)
from mtd_jax.decoding.heads import Heads
from mtd_jax.decoding.method import DecodeState
from mtd_jax.decoding.row_trees import AnyTree, RowTrees
from mtd_jax.decoding.sampling import SamplingRows, candidates, log_probabilities
from mtd_jax.decoding.speculative import verify_draws
from mtd_jax.decoding.tree import TokenTree
from mtd_jax.errors import InputError
from mtd_jax.methods import cp_mixture
from mtd_jax.methods.copies import Copies
from mtd_jax.methods.cp_beam import likeliest_paths
from mtd_jax.methods.cp_heads import CPSpec
from mtd_jax.methods.cp_weights import CPWeights
from mtd_jax.methods.drafting import Known, TreeDrafting, choose_trees
from mtd_jax.parameters import size_in_bytes
from mtd_jax.transformer.model import Parameters, normed
from mtd_jax.typing import Array, Bool, Float, Int

Acceptance: TypeAlias = Literal["exact", "rejection", "typical"]


class CP(TreeDrafting):
    """The module's docstring says it; made by `methods.cp`."""

    weights: CPWeights
    vocabulary: DraftVocabulary | None
    drawn: bool = struct.field(pytree_node=False, default=False)
    """Drafts are tested by min(1, p / q), with the conditional that they were drawn from; siblings
    were drawn from it without replacement."""
    marginal: bool = struct.field(pytree_node=False, default=False)
    """What is decoded is the mixture's own first token: the trunk was trained with the heads."""

    name: ClassVar[str] = CPSpec.name

    def plain(self) -> CP | None:
        """Where heads were trained with their trunk: the mixture's first token, a step each."""
        if not self.marginal:
            return None
        once = jnp.ones(1, jnp.float32)
        return self.replace(trees=(TokenTree.chain(0),), expected=0 * once, costs=once, auto=False)

    def check(self, config: ModelConfig, cycles: frozenset[int]) -> str | None:
        """As for all; and that a node has no more children than there are tokens."""
        check_ranks(self.vocabulary, config, self.ranks)
        return super().check(config, cycles)

    def partial_bytes(self, params: Parameters, cached: float) -> float:
        """The heads and what they read with, once for all drafts of a step."""
        own = size_in_bytes(self.weights)
        return own + (bytes_read(self.vocabulary, params) if self.weights.output is None else 0)

    def output(self, params: Parameters, x: Float[Array, "*rows D"]) -> Float[Array, "*rows V"]:
        """The model's logits; or where they were trained together the marginal (eq. 11)."""
        if not self.marginal:
            return super().output(params, x)
        e = normed(params, x)
        tables = self.weights.first(1).log_p(params, e)[..., 0, :]
        return cp_mixture.mixed(self.weights.log_w(e), tables)

    def verified(
        self,
        params: Parameters,
        state: DecodeState,
        tree: TokenTree,
        copies: Copies | None,
        copying: Bool[Array, " B"],
    ) -> DecodeState:
        """Drafts that were drawn are tested against what they were drawn from."""
        if not self.drawn or tree.size == 1:
            return super().verified(params, state, tree, copies, copying)
        known: Known = state.extra
        drafts, log_q = self.drafts(params, known.row, state, tree)
        many = jnp.full_like(state.pending, tree.max_depth)
        state, seen = verify_draws(
            params, state, drafts, many, log_q, tree=tree, output=self.output
        )
        return state.replace(extra=known.replace(row=seen.last_row))

    def proposed(
        self, params: Parameters, state: DecodeState, tree: TokenTree
    ) -> tuple[AnyTree, Int[Array, "B drafts"]]:
        """The chain of the likeliest tokens, or the likeliest paths."""
        row: jax.Array = state.extra.row
        if tree.is_chain:
            return tree, self.drafts(params, row, state, tree)[0]
        return self.likeliest(params, row, state, tree)

    def drafts(
        self, params: Parameters, row: Float[Array, "B D"], state: DecodeState, tree: TokenTree
    ) -> tuple[Int[Array, "B drafts"], Float[Array, "B inner V"]]:
        """Tokens of a fixed tree: each by the conditional of its path behind the pending token.

        Children of a node are the likeliest tokens by its conditional, of rows that draw: the
        likeliest to be drawn (`sampling.candidates`).

        Returns:
          the tokens, and where they are to be tested by it, for every node that has children the
          log-distribution that these were drawn from (zeros, if no row draws); else no entries.
        """
        sampling, drafted = state.requests.sampling, self.vocabulary
        log_pi, log_p = self._behind(params, row, state.pending, tree.max_depth)
        log_pi = log_pi[:, None]
        batch, vocab = row.shape[0], params.config.vocab_size
        on_tree = jnp.zeros((batch, tree.size), jnp.int32)
        drawn_from = []
        for depth in range(tree.max_depth):
            here, below = (np.flatnonzero(tree.depth == d) for d in (depth, depth + 1))
            parent = np.searchsorted(here, np.asarray((0, *tree.parents))[below])
            table = log_p[:, :, depth]
            log_q = cp_mixture.along_paths(log_pi, table)
            rows = sampling.repeat(len(here))
            places = jnp.repeat(state.cache.length + 1 + depth, len(here))
            flat = log_q.reshape(-1, log_q.shape[-1])
            wide = 1 + int(tree.rank[below].max())
            found = candidates(flat, rows, places, wide, drafted)
            columns = found.reshape(batch, len(here), wide)[:, parent, tree.rank[below]]
            on_tree = on_tree.at[:, below].set(tokens_of(drafted, columns))
            seen = jnp.take_along_axis(table, columns[:, None], axis=-1).swapaxes(1, 2)
            log_pi = cp_mixture.told(log_pi[:, parent], seen)[1]
            if self.drawn:
                log_q = over_all(drafted, _distribution(flat, rows))
                drawn_from.append(log_q.reshape(batch, len(here), vocab))
        none = jnp.zeros((batch, 0, vocab))
        log_q = jnp.concatenate(drawn_from, axis=1) if drawn_from else none
        return on_tree[:, 1:], log_q

    def likeliest(
        self, params: Parameters, row: Float[Array, "B D"], state: DecodeState, tree: TokenTree
    ) -> tuple[RowTrees, Int[Array, "B drafts"]]:
        """As many drafts as `tree` has, as deep as it, on the likeliest paths; -1 is none."""
        log_pi, log_p = self._behind(params, row, state.pending, tree.max_depth)
        trees, columns, _ = likeliest_paths(
            log_pi,
            log_p,
            state.requests.sampling,
            state.cache.length + 1,
            count=tree.size - 1,
            vocabulary=self.vocabulary,
        )
        tokens = tokens_of(self.vocabulary, jnp.maximum(columns, 0))
        return trees, jnp.where(columns >= 0, tokens, -1)

    def _behind(
        self, params: Parameters, row: Array, pending: Array, steps: int
    ) -> tuple[Float[Array, "B r"], Float[Array, "B r steps N"]]:
        """Behind the pending token: how likely each expert is, and its tables of the next steps."""
        e = normed(params, row)
        log_p = self.weights.first(steps + 1).log_p(reader_of(self.vocabulary, params), e)
        known = columns_of(self.vocabulary, pending)
        log_pi = cp_mixture.seen(self.weights.log_w(e), log_p[:, :, 0], known)
        return log_pi, log_p[:, :, 1:]


def make(
    spec: CPSpec,
    heads: Heads,
    *,
    tree: str = "auto",
    acceptance: Acceptance = "exact",
    copy: bool = False,
) -> CP:
    """The method with these heads; `methods.cp` says what the options mean.

    Raises:
      InputError: as for `choose_trees`; copies cannot be drawn.
    """
    if copy and acceptance == "rejection":
        raise InputError("copy does not go with acceptance=rejection: copies are not drawn")
    trees = choose_trees(tree, spec.depth, heads.accuracies)
    steps = 1 + max(t.max_depth for t in trees.trees)
    return CP(
        **trees.fields("typical" if acceptance == "typical" else "exact", copy),
        weights=heads.weights.first(steps),
        vocabulary=heads.vocabulary,
        drawn=acceptance == "rejection",
        marginal=spec.trunk == "trained",
    )


def _distribution(logits: Float[Array, "B V"], rows: SamplingRows) -> Float[Array, "B V"]:
    """What `candidates` draws from; a branch, because it is a pass over the vocabulary."""
    return jax.lax.cond(
        jnp.any(rows.temperature > 0),
        lambda: log_probabilities(logits, rows),
        lambda: jnp.zeros_like(logits),
    )
