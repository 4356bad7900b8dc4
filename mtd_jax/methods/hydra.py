"""Hydra (arXiv 2402.05109): Medusa's heads, each of which knows the tokens in front of its own.

Head i (from 0) reads the normed output h of the last layer at position n, as Medusa's does, and the
embeddings of the tokens n + 1 .. n + i + 1, and guesses token n + i + 2:

    h_i = h + SiLU(h W_i + sum_(j <= i) e_(n+j+1) T_ij + b_i)      all of them begin at zero
    p_i = softmax(h_i O)                                           O: the base's output head

where e is a token's embedding over its root mean square. The base has said token n + 1 when the
first head is asked, and what the later heads are told are the drafts in front of theirs: every path
of a tree is continued by guesses of its own. Two heads, the tree 2x1 (n + 1 is the root):

    n + 1     n + 2         n + 3
    the  ->   cat (head 0)  ->  sat     head 1, told "the cat"
         ->   dog (head 0)  ->  barked  head 1, told "the dog"

These are the simplest heads of the paper, of one layer each. Trained as Medusa-1: the base is
frozen, the tokens told are the text's.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jax.nn import initializers

from mtd_jax import parameters
from mtd_jax.config import ModelConfig
from mtd_jax.decoding.draft_vocabulary import (
    DraftVocabulary,
    bytes_read,
    check_ranks,
    reader_of,
    tokens_of,
)
from mtd_jax.decoding.heads import Heads
from mtd_jax.decoding.method import DecodeState
from mtd_jax.decoding.row_trees import AnyTree
from mtd_jax.decoding.sampling import candidates
from mtd_jax.decoding.speculative import Acceptance
from mtd_jax.decoding.tree import TokenTree
from mtd_jax.methods.drafting import TreeDrafting, choose_trees
from mtd_jax.methods.row_heads import RowHeadsSpec
from mtd_jax.parameters import Weight, size_in_bytes
from mtd_jax.transformer.linear import contract, rms_norm
from mtd_jax.transformer.model import Parameters, embed, normed, project
from mtd_jax.transformer.packed import Packed, frozen_rows, shifted
from mtd_jax.typing import Array, Float, Int

_EPSILON = 1e-12
"""Under an embedding's mean square, which may be all zeros."""


class HydraWeights(struct.PyTreeNode):
    """What is trained."""

    weight: Any
    """[k, D, D]: W_i is `weight[i]`."""
    told: Any
    """[k (k + 1) / 2, D, D]: T_ij is `told[i (i + 1) / 2 + j]`."""
    bias: Any
    """[k, D]"""

    def seen(self, i: int, h: Float[Array, "*rows D"]) -> Float[Array, "*rows D"]:
        """What head i makes of the last layer's output, before it is told anything."""
        bias = self.bias[i].astype(h.dtype).reshape((1,) * (h.ndim - 1) + (-1,))
        return contract("...D,DE->...E", h, self.weight[i].astype(h.dtype)) + bias

    def heard(self, i: int, j: int, e: Float[Array, "*rows D"]) -> Float[Array, "*rows D"]:
        """What head i makes of the j-th token that it is told, by `embedded`."""
        return contract("...D,DE->...E", e, self.told[i * (i + 1) // 2 + j].astype(e.dtype))

    def first(self, count: int) -> HydraWeights:
        """The heads of the first `count` places."""
        pairs = count * (count + 1) // 2
        return HydraWeights(self.weight[:count], self.told[:pairs], self.bias[:count])


def embedded(params: Parameters, tokens: Int[Array, "B T"]) -> Float[Array, "B T D"]:
    """Embeddings over their root mean square: a model's are as small as it likes."""
    found = embed(params, tokens)
    return rms_norm(found, jnp.ones(found.shape[-1], found.dtype), _EPSILON)


@dataclasses.dataclass(frozen=True)
class HydraSpec(RowHeadsSpec):
    """Options of Hydra that say what is trained, and how.

    Raises:
      InputError: a value outside its range.
    """

    name: ClassVar[str] = "hydra"

    def declare(self, config: ModelConfig) -> HydraWeights:
        """`Weight`s; zeros make a head of the base's own guess."""
        width, zeros = config.hidden_size, initializers.zeros
        axes = (None, "embed", None)
        pairs = self.count * (self.count + 1) // 2
        return HydraWeights(
            weight=Weight((self.count, width, width), axes, zeros),
            told=Weight((pairs, width, width), axes, zeros),
            bias=Weight((self.count, width), (None, None), zeros),
        )

    def initial(self, base: Parameters, key: jax.Array) -> HydraWeights:
        """Zeros."""
        return parameters.initialize(self.declare(base.config), key)

    def rows(
        self, weights: HydraWeights, base: Parameters, batch: Packed
    ) -> tuple[Float[Array, "B T D"], Float[Array, "B T k D"]]:
        """From the last layer's output and the tokens that follow in the text."""
        h = normed(base, frozen_rows(base, batch))
        told = [embedded(base, shifted(batch.tokens, j + 1)) for j in range(self.count)]
        found = []
        for i in range(self.count):
            heard = [weights.heard(i, j, told[j]) for j in range(i + 1)]
            found.append(h + jax.nn.silu(sum(heard, weights.seen(i, h))))
        return h, jnp.stack(found, axis=2)

    def flops(self, config: ModelConfig) -> float:
        """2 for each weight forward and 2 for its gradient; for rows of the output head as well."""
        maps = sum(math.prod(w.shape) for w in jax.tree.leaves(self.declare(config)))
        output = config.hidden_size * self.tokens(config) * self.count
        return 4.0 * maps + 4.0 * output


class Hydra(TreeDrafting):
    """See the module's docstring; made by `methods.hydra`."""

    weights: HydraWeights
    vocabulary: DraftVocabulary | None

    name: ClassVar[str] = HydraSpec.name

    def partial_bytes(self, params: Parameters, cached: float) -> float:
        """The heads, and what they read with: once for each place."""
        return size_in_bytes(self.weights) + self.depth * bytes_read(self.vocabulary, params)

    def check(self, config: ModelConfig, cycles: frozenset[int]) -> str | None:
        """As for all; and that a node has no more children than there are tokens."""
        check_ranks(self.vocabulary, config, self.ranks)
        return super().check(config, cycles)

    def proposed(
        self, params: Parameters, state: DecodeState, tree: TokenTree
    ) -> tuple[AnyTree, Int[Array, "B drafts"]]:
        """Depth by depth: what a head guesses behind every path so far.

        Children of a node are the likeliest tokens by its logits; of rows that draw, the likeliest
        to be drawn (`sampling.candidates`).
        """
        sampling, vocabulary = state.requests.sampling, self.vocabulary
        reader = reader_of(vocabulary, params)
        h = normed(params, state.extra.row)[:, None]
        batch = h.shape[0]
        on_tree = jnp.zeros((batch, tree.size), jnp.int32).at[:, 0].set(state.pending)
        for depth in range(tree.max_depth):
            below = np.flatnonzero(tree.depth == depth + 1)
            above = np.asarray((0, *tree.parents))[below]
            here, parent = np.unique(above, return_inverse=True)
            row = self.weights.seen(depth, h)
            for j, nodes in enumerate(tree.paths[here, : depth + 1].T):
                row = row + self.weights.heard(depth, j, embedded(params, on_tree[:, nodes]))
            logits = project(reader, h + jax.nn.silu(row)).reshape(batch * len(here), -1)
            places = jnp.repeat(state.cache.length + 1 + depth, len(here))
            wide = 1 + int(tree.rank[below].max())
            found = candidates(logits, sampling.repeat(len(here)), places, wide, vocabulary)
            columns = found.reshape(batch, len(here), wide)[:, parent, tree.rank[below]]
            on_tree = on_tree.at[:, below].set(tokens_of(vocabulary, columns))
        return tree, on_tree[:, 1:]


def make(
    spec: HydraSpec,
    heads: Heads,
    *,
    tree: str = "auto",
    acceptance: Acceptance = "exact",
    copy: bool = False,
) -> Hydra:
    """The method with these heads; `methods.hydra` says what the options mean."""
    trees = choose_trees(tree, spec.depth, heads.accuracies)
    return Hydra(
        **trees.fields(acceptance, copy),
        weights=heads.weights.first(trees.depth),
        vocabulary=heads.vocabulary,
    )
