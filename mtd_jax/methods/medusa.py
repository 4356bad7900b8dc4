"""Medusa (arXiv 2401.10774): heads on the last layer guess the tokens behind the next one.

Head i (from 0) reads the normed output h of the last layer at position n and guesses token
n + i + 2; the base itself says n + 1:

    h_i = h + SiLU(h W_i + b_i)        W_i, b_i begin at zero
    p_i = softmax(h_i O)               O: the base's output head, or a matrix of the head's own

Trained as Medusa-1: the base is frozen, the loss is sum_i decay^i mean_n L_i(n).
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import struct
from jax.nn import initializers

from mtd_jax.config import ModelConfig
from mtd_jax.decoding.draft_vocabulary import DraftVocabulary, bytes_read, likeliest
from mtd_jax.decoding.heads import Heads
from mtd_jax.decoding.speculative import Acceptance
from mtd_jax.errors import InputError
from mtd_jax.methods.drafting import RowDrafting, choose_trees
from mtd_jax.methods.row_heads import RowHeadsSpec
from mtd_jax.parameters import Weight, size_in_bytes
from mtd_jax.transformer.cache import KVCache
from mtd_jax.transformer.linear import contract
from mtd_jax.transformer.model import Parameters, normed, project
from mtd_jax.transformer.packed import Packed, frozen_rows
from mtd_jax.typing import Array, Float, Int


class MedusaWeights(struct.PyTreeNode):
    """What is trained."""

    weight: Any
    """[D, k, D]: W_i is `weight[:, i]`. One wide product makes the rows of all heads: XLA for CPU
    is slower where they are a batch axis."""
    bias: Any
    """[k, D]"""
    output: Any
    """Tuple: of each head a matrix [D, V]; none where they share the base's."""

    def rows(self, h: Float[Array, "*rows D"]) -> Float[Array, "*rows k D"]:
        """What each head makes of the normed output of the last layer."""
        wide, narrow = self.bias.shape
        product = contract("...D,DE->...E", h, self.weight.astype(h.dtype).reshape(narrow, -1))
        product = product.reshape(*h.shape[:-1], wide, narrow)
        bias = self.bias.astype(h.dtype).reshape((1,) * (h.ndim - 1) + (wide, narrow))
        return h[..., None, :] + jax.nn.silu(product + bias)

    def head(self, base: Parameters, i: int) -> Parameters:
        """The base with the output matrix that head i reads."""
        if not self.output:
            return base
        config = dataclasses.replace(base.config, tie_embeddings=False)
        own = self.output[i].astype(base.embedding.dtype)
        return base.replace(head=own, config=config)

    def first(self, count: int) -> MedusaWeights:
        """The heads of the first `count` places."""
        if count == self.bias.shape[0]:
            return self
        return MedusaWeights(self.weight[:, :count], self.bias[:count], self.output[:count])


@dataclasses.dataclass(frozen=True)
class MedusaSpec(RowHeadsSpec):
    """Options of Medusa that say what is trained, and how.

    Raises:
      InputError: a value outside its range.
    """

    own_output: bool = False
    """Each head has an output matrix of its own, which begins as the base's (as published). By
    default all share the base's: a thirtieth of the size for a small model."""

    name: ClassVar[str] = "medusa"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.vocabulary and self.own_output:
            raise InputError("vocabulary does not go with own_output")

    def declare(self, config: ModelConfig) -> MedusaWeights:
        """`Weight`s; zeros make a head of the base's own guess."""
        width, vocab = config.hidden_size, config.vocab_size
        zeros = initializers.zeros
        output = Weight((width, vocab), ("embed", "vocab"), zeros)
        return MedusaWeights(
            weight=Weight((width, self.count, width), ("embed", None, None), zeros),
            bias=Weight((self.count, width), (None, None), zeros),
            output=tuple(output for _ in range(self.count)) if self.own_output else (),
        )

    def initial(self, base: Parameters, key: jax.Array) -> MedusaWeights:
        """Zeros, and copies of the base's output head."""
        del key
        zeros = jax.tree.map(lambda w: jnp.zeros(w.shape, jnp.float32), self.declare(base.config))
        if not self.own_output:
            return zeros
        head = base.embedding.T if base.head is None else base.head
        own = [head.astype(jnp.float32) for _ in range(self.count)]
        return zeros.replace(output=tuple(own))

    def rows(
        self, weights: MedusaWeights, base: Parameters, batch: Packed
    ) -> tuple[Float[Array, "B T D"], Float[Array, "B T k D"]]:
        """From the last layer's output alone."""
        h = normed(base, frozen_rows(base, batch))
        return h, weights.rows(h)

    def reader(self, weights: MedusaWeights, base: Parameters, i: int) -> Parameters:
        """The base, with the output matrix of head i if it has one."""
        return weights.head(base, i)

    def flops(self, config: ModelConfig) -> float:
        """2 for each weight forward, 2 for its gradient, 2 for the row's where that is wanted."""
        weight = math.prod(self.declare(config).weight.shape)
        output = config.hidden_size * self.tokens(config) * self.count
        return 4.0 * weight + (6.0 if self.own_output else 4.0) * output


class Medusa(RowDrafting):
    """See the module's docstring; made by `methods.medusa`."""

    weights: MedusaWeights
    vocabulary: DraftVocabulary | None

    name: ClassVar[str] = MedusaSpec.name

    def partial_bytes(self, params: Parameters, cached: float) -> float:
        """The heads and what they read with, once for all drafts of a step."""
        if self.weights.output:
            return size_in_bytes(self.weights)
        return size_in_bytes(self.weights) + bytes_read(self.vocabulary, params)

    def guesses(
        self,
        params: Parameters,
        row: Float[Array, "B D"],
        ranks: int,
        cache: KVCache | None = None,
    ) -> Int[Array, "B depth ranks"]:
        """The likeliest tokens of every head."""
        if self.weights.output:
            return jax.lax.top_k(self.logits(params, row), ranks)[1].astype(jnp.int32)
        rows = self.weights.rows(normed(params, row))
        return likeliest(self.vocabulary, params, rows, ranks)

    def logits(self, params: Parameters, row: Float[Array, "B D"]) -> Float[Array, "B k V"]:
        """Float32 logits of every head from the last layer's output."""
        rows = self.weights.rows(normed(params, row))
        if not self.weights.output:
            return project(params, rows)
        own = [project(self.weights.head(params, i), rows[:, i]) for i in range(rows.shape[1])]
        return jnp.stack(own, axis=1)


def make(
    spec: MedusaSpec,
    heads: Heads,
    *,
    tree: str = "auto",
    acceptance: Acceptance = "exact",
    copy: bool = False,
) -> Medusa:
    """The method with these heads; `methods.medusa` says what the options mean."""
    trees = choose_trees(tree, spec.depth, heads.accuracies)
    return Medusa(
        **trees.fields(acceptance, copy),
        weights=heads.weights.first(trees.depth),
        vocabulary=heads.vocabulary,
    )
