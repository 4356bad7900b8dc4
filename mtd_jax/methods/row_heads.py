"""What methods share whose heads guess k places from one row each: the loss, and what is measured.

Head i (from 0) makes a row from what the base makes of tokens 0..n, and reads its guess at token
n + i + 2 from it; the base itself says n + 1. The base is frozen, the loss is sum_i decay^i mean_n
L_i(n) (Medusa-1, arXiv 2401.10774, eq. 1).
"""

from __future__ import annotations

import abc
import dataclasses
from collections.abc import Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp

from mtd_jax.config import ModelConfig
from mtd_jax.decoding.draft_vocabulary import check_count, cut
from mtd_jax.decoding.heads import HeadsSpec
from mtd_jax.errors import InputError
from mtd_jax.transformer.losses import Totals, cross_entropy, divergences, mapped_over_chunks
from mtd_jax.transformer.model import Parameters, project
from mtd_jax.transformer.packed import Packed
from mtd_jax.typing import Array, Float, Int

_MOST_HEADS = 16


@dataclasses.dataclass(frozen=True)
class RowHeadsSpec(HeadsSpec):
    """Options of all these methods.

    Raises:
      InputError: a value outside its range.
    """

    count: int = 3
    """k: heads, each for one more place behind the next token."""
    loss: Literal["cross_entropy", "distillation"] = "distillation"
    """`cross_entropy` with the text, or `distillation`: the divergence from what the base itself
    says at that place, KL(p_base(. | x_<=n+i+1) || p_i(. | x_<=n))."""
    decay: float = 0.8
    """Weight of a head's loss against that of the head before it."""
    vocabulary: int = 0
    """So many of the tokens that are most frequent in the answers trained on are drafted, learned
    from and read of the output head (FR-Spec, arXiv 2502.14856); 0 is all."""

    def __post_init__(self) -> None:
        if not 1 <= self.count <= _MOST_HEADS:
            raise InputError(f"count must be between 1 and {_MOST_HEADS}, got {self.count}")
        if not 0.0 < self.decay <= 1.0:
            raise InputError(f"decay must be over 0 and at most 1, got {self.decay}")
        check_count(self.vocabulary, self.loss)

    @property
    def depth(self) -> int:
        """Every head guesses one place."""
        return self.count

    @abc.abstractmethod
    def rows(
        self, weights: Any, base: Parameters, batch: Packed
    ) -> tuple[Float[Array, "B T D"], Float[Array, "B T k D"]]:
        """The base's rows and those of every head, behind the final norm; `base` is frozen."""

    def reader(self, weights: Any, base: Parameters, i: int) -> Parameters:
        """The model whose output head reads the rows of head i."""
        return base

    def counts(self, batch: Packed) -> Totals:
        """Tokens to guess, for each head and in all."""
        each = [batch.targets(i + 2)[1].sum(dtype=jnp.float32) for i in range(self.count)]
        return {"loss": sum(each[1:], each[0]), **{_count(i): n for i, n in enumerate(each)}}

    def training_loss(
        self,
        weights: Any,
        base: Parameters,
        batch: Packed,
        counts: Totals,
        *,
        chunk: int,
        vocabulary: tuple[int, ...] = (),
    ) -> tuple[jax.Array, Totals]:
        """sum_i decay^i mean_n L_i(n), and how often each head's best guess is right.

        Args:
          vocabulary: ids, of which alone both the base and the heads say the next.
        """
        base = jax.lax.stop_gradient(base)
        h, rows = self.rows(weights, base, batch)
        base = cut(base, vocabulary) if vocabulary else base
        readers = tuple(self.reader(weights, base, i) for i in range(self.count))
        wanted = [batch.targets(i + 2)[1] for i in range(self.count)]
        numbers = [jnp.maximum(counts[_count(i)], 1.0) for i in range(self.count)]
        shares = [self.decay**i / number for i, number in enumerate(numbers)]
        if self.loss == "distillation":
            weighed = [jnp.where(w, s, 0.0) for w, s in zip(wanted, shares, strict=True)]
            loss, right = divergences(
                base,
                h,
                rows,
                jnp.stack(weighed, axis=2),
                chunk=chunk,
                readers=() if all(reader is base for reader in readers) else readers,
            )
        else:
            loss, right = self.cross_entropies(readers, rows, batch, shares, chunk=chunk)
        measured = {f"accuracy_{i + 1}": right[i] / n for i, n in enumerate(numbers)}
        return loss, {"loss": loss, **measured}

    def cross_entropies(
        self,
        readers: Sequence[Parameters],
        rows: Float[Array, "B T k D"],
        batch: Packed,
        shares: Sequence[float | Array],
        *,
        chunk: int,
    ) -> tuple[Float[Array, ""], Float[Array, " k"]]:
        """The heads' cross-entropies with the text, in these shares, and right guesses of each."""
        found = [
            cross_entropy(reader, rows[:, :, i], *batch.targets(i + 2), chunk=chunk, normed=True)
            for i, reader in enumerate(readers)
        ]
        losses = [s * each["loss"] for s, each in zip(shares, found, strict=True)]
        return sum(losses[1:], losses[0]), jnp.stack([each["right"] for each in found])

    def guesses(
        self,
        weights: Any,
        base: Parameters,
        batch: Packed,
        ranks: int,
        *,
        chunk: int,
        vocabulary: tuple[int, ...] = (),
    ) -> tuple[Int[Array, "B T"], Int[Array, "B T k ranks"]]:
        """Of every position, as `HeadsSpec.guesses` says; heads guess of `vocabulary` alone."""
        h, rows = self.rows(weights, base, batch)
        own = ranked(base, h, 1, chunk)[..., 0]
        base = cut(base, vocabulary) if vocabulary else base
        heads = [
            ranked(self.reader(weights, base, i), rows[..., i, :], ranks, chunk)
            for i in range(self.count)
        ]
        found = jnp.stack(heads, axis=2)
        return own, jnp.asarray(vocabulary, jnp.int32)[found] if vocabulary else found

    def tokens(self, config: ModelConfig) -> int:
        """Those that are drafted: rows of the output head that heads read."""
        return min(self.vocabulary or config.vocab_size, config.vocab_size)


def ranked(
    params: Parameters, rows: Float[Array, "B T D"], ranks: int, chunk: int
) -> Int[Array, "B T ranks"]:
    """The likeliest tokens at rows behind the final norm, `chunk` positions of logits at a time."""

    def of_chunk(part: jax.Array) -> jax.Array:
        return jax.lax.top_k(project(params, part), ranks)[1].astype(jnp.int32)

    found: jax.Array = mapped_over_chunks(of_chunk, rows, chunk)
    return found


def _count(i: int) -> str:
    """The name under which the tokens for head i are counted."""
    return f"head_{i + 1}"
