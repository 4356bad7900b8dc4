"""Drafting from the frequent tokens alone, so that drafts read a part of the output head.

What the whole head verifies is lossless whatever was drafted; a token that is not in the draft
vocabulary is merely never drafted (FR-Spec, arXiv 2502.14856). The output head is a fifth of
SmolLM2-135M, and tokens that texts of a kind use are few.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from mtd_jax.config import ModelConfig
from mtd_jax.errors import InputError
from mtd_jax.transformer.model import Parameters, project
from mtd_jax.typing import Array, Float, Int, Leaf

VOCABULARY = "vocabulary"
"""Where a record of heads keeps the ids that may be drafted, frequent ones first."""
_FEWEST = 64


class DraftVocabulary(struct.PyTreeNode):
    """Tokens that may be drafted."""

    tokens: Leaf
    """[N] int32: ids."""
    columns: Leaf
    """[D, N]: theirs of the base's output head."""
    numbers: Leaf
    """[V] int32: which column every token has, -1 for those that are not drafted."""

    @classmethod
    def of(cls, params: Parameters, ids: Any) -> DraftVocabulary:
        """The part of a base's output head that these tokens need.

        Raises:
          InputError: `ids` is no list of different ids of the base.
        """
        size = params.config.vocab_size
        known = isinstance(ids, list) and all(type(i) is int and 0 <= i < size for i in ids)
        if not known or not ids or len(set(ids)) < len(ids):
            raise InputError(f"'{VOCABULARY}' of the heads must hold different ids under {size}")
        tokens = jnp.asarray(ids, jnp.int32)
        return cls(tokens, output_rows(params, tokens).T, jnp.asarray(numbered(ids, size)))


def check_count(count: int, loss: str) -> None:
    """How many tokens may be drafted; 0: all.

    Raises:
      InputError: too few to be of use, or with a loss that is of all.
    """
    if count and count < _FEWEST:
        raise InputError(f"vocabulary must be 0 (all) or at least {_FEWEST}, got {count}")
    if count and loss != "distillation":
        raise InputError("vocabulary goes with loss = distillation alone")


def check_ranks(vocabulary: DraftVocabulary | None, config: ModelConfig, ranks: int) -> None:
    """That a node has no more children than there are tokens to draft.

    Raises:
      InputError: it has.
    """
    drafted = config.vocab_size if vocabulary is None else len(vocabulary.tokens)
    if ranks > drafted:
        raise InputError(f"a tree with {ranks} guesses at a place, of {drafted} tokens")


def bytes_read(vocabulary: DraftVocabulary | None, params: Parameters) -> int:
    """What drafting reads of the output head."""
    width = params.config.vocab_size if vocabulary is None else vocabulary.tokens.shape[0]
    return int(width * params.config.hidden_size * params.embedding.itemsize)


def reader_of(vocabulary: DraftVocabulary | None, params: Parameters) -> Parameters:
    """The base, with the part of its output head that drafts read."""
    if vocabulary is None:
        return params
    config = dataclasses.replace(params.config, tie_embeddings=False)
    return params.replace(head=vocabulary.columns, config=config)


def columns_of(
    vocabulary: DraftVocabulary | None, tokens: Int[Array, "*any"]
) -> Int[Array, "*any"]:
    """Where logits of `reader_of` have these tokens; -1: nowhere."""
    return tokens if vocabulary is None else vocabulary.numbers[tokens]


def tokens_of(
    vocabulary: DraftVocabulary | None, columns: Int[Array, "*any"]
) -> Int[Array, "*any"]:
    """The tokens of these columns of logits of `reader_of`."""
    return columns if vocabulary is None else vocabulary.tokens[columns]


def over_all(
    vocabulary: DraftVocabulary | None, log_q: Float[Array, "*rows N"]
) -> Float[Array, "*rows V"]:
    """Log-probabilities of all tokens: -inf for those that are not drafted."""
    if vocabulary is None:
        return log_q
    return jnp.where(vocabulary.numbers >= 0, log_q[..., vocabulary.numbers], -jnp.inf)


def likeliest(
    vocabulary: DraftVocabulary | None,
    params: Parameters,
    rows: Float[Array, "B k D"],
    ranks: int,
) -> Int[Array, "B k ranks"]:
    """The likeliest tokens by rows behind the final norm, of those that may be drafted."""
    if vocabulary is None:
        return jax.lax.top_k(project(params, rows), ranks)[1].astype(jnp.int32)
    count = min(ranks, vocabulary.tokens.shape[0])
    found = vocabulary.tokens[jax.lax.top_k(project(reader_of(vocabulary, params), rows), count)[1]]
    # -1 is no token: a node of the tree that nothing can stand at.
    return jnp.pad(found, ((0, 0), (0, 0), (0, ranks - count)), constant_values=-1)


def output_rows(params: Parameters, tokens: Int[Array, " N"]) -> Float[Array, "N D"]:
    """What the output head has for these tokens."""
    return params.embedding[tokens] if params.head is None else params.head[:, tokens].T


def cut(base: Parameters, ids: Sequence[int]) -> Parameters:
    """The base with an output head for these tokens alone: logit i is that of `ids[i]`.

    For `project` and `unembed`; it cannot embed any more.
    """
    rows = output_rows(base, jnp.asarray(ids, jnp.int32))
    config = dataclasses.replace(base.config, vocab_size=len(ids), tie_embeddings=True)
    return base.replace(embedding=rows, head=None, config=config)


def numbered(ids: Sequence[int], size: int) -> np.ndarray:
    """[size] int32: where each token stands in `ids`; -1: nowhere."""
    numbers = np.full(size, -1, np.int32)
    numbers[np.asarray(ids, np.int64)] = np.arange(len(ids), dtype=np.int32)
    return numbers


def most_frequent(texts: Iterable[np.ndarray], size: int, count: int) -> tuple[int, ...]:
    """Ids of the `count` tokens that stand in these texts most often, of `size` that there are."""
    counts = np.zeros(size, np.int64)
    for text in texts:
        counts += np.bincount(text, minlength=size)
    return tuple(np.argsort(-counts, kind="stable")[:count].tolist())
