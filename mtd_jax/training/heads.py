"""Training of heads: the weights of a method over a base that stays as it is."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding

from mtd_jax import methods, sharding
from mtd_jax.decoding.draft_vocabulary import DraftVocabulary
from mtd_jax.decoding.heads import ACCURACIES, Heads, HeadsSpec
from mtd_jax.decoding.method import Method
from mtd_jax.errors import InputError
from mtd_jax.training.rows import Rows
from mtd_jax.training.utilization import weights_in_products
from mtd_jax.transformer.losses import Totals
from mtd_jax.transformer.model import Parameters
from mtd_jax.transformer.packed import Packed, shifted

_AT_ONCE = 64
"""Rows that are looked at together."""


@dataclasses.dataclass(frozen=True)
class HeadsTraining:
    """The objective of every method of `methods.SPECS`: the spec says what is learned."""

    spec: HeadsSpec
    options: tuple[tuple[str, Any], ...]
    """All of [options]: those of the spec, and those that decoding begins with."""
    seed: int
    """Of the weights before the first step."""
    chunk: int
    """Positions whose logits a device holds at a time, over all its rows."""
    vocabulary: tuple[int, ...] = ()
    """Ids that are drafted, where the spec asks for some; empty: all of the base's."""

    def split(self, params: Parameters) -> tuple[Any, Any]:
        """New weights of the method, laid out as the base is; and the base."""
        declared = self.spec.declare(params.config)
        place = params.embedding.sharding
        if isinstance(place, NamedSharding):
            mesh: Any = place.mesh
            places = sharding.shardings(mesh, declared)
        else:
            places = jax.tree.map(lambda _: place, declared)
        if isinstance(params.embedding, jax.ShapeDtypeStruct):
            dtype = params.embedding.dtype
            weights = jax.tree.map(
                lambda w, p: jax.ShapeDtypeStruct(w.shape, dtype, sharding=p), declared, places
            )
            return weights, params
        initial = jax.jit(self.spec.initial, out_shardings=places)
        return initial(params, jax.random.key(self.seed)), params

    def counts(self, batch: Packed) -> Totals:
        """What the spec counts."""
        return self.spec.counts(batch)

    def check_rows(self, rows: Rows) -> None:
        """Looks whether there is something to learn for every head.

        Raises:
          InputError: names the heads for which no row has anything: all texts are too short.
        """
        missing: set[str] | None = None
        for first in range(0, len(rows), _AT_ONCE):
            some = [rows[i] for i in range(first, min(first + _AT_ONCE, len(rows)))]
            counts = self.counts(jax.tree.map(lambda *x: jnp.asarray(np.stack(x)), *some))
            nothing = {name for name, number in counts.items() if not number} - {"loss", "joint"}
            missing = nothing if missing is None else missing & nothing
            if not missing:
                return
        if missing:
            raise InputError(
                f"{self.spec.name} has nothing to learn for {', '.join(sorted(missing))}: no text "
                "of data.train is so long, or data.length cuts it"
            )

    def loss(
        self, trainable: Any, frozen: Any, batch: Packed, counts: Totals, key: jax.Array | None
    ) -> tuple[jax.Array, Totals]:
        """What the spec says."""
        del key
        chunk = self.chunk_of(batch)
        ids = {"vocabulary": self.vocabulary} if self.vocabulary else {}
        return self.spec.training_loss(trainable, frozen, batch, counts, chunk=chunk, **ids)

    def chunk_of(self, batch: Packed) -> int:
        """Positions of a row whose logits exist at a time."""
        rows: int = batch.tokens.shape[0]
        return max(1, self.chunk // max(1, rows // sharding.parts("batch")))

    def flops(self, trainable: Any, frozen: Any) -> float:
        """The base forward, its output head once; the heads both ways."""
        del trainable
        config = frozen.config
        unread = (config.vocab_size - len(self.vocabulary)) if self.vocabulary else 0
        products = weights_in_products(frozen) - unread * config.hidden_size
        return 2.0 * products + self.spec.flops(config)

    def heads(self, trainable: Any, base: str, record: dict[str, Any]) -> Heads:
        """Trained weights as what is kept of them."""
        return Heads(self.spec.name, dict(self.options), base, trainable, record)

    def decoder(self, trainable: Any, frozen: Any) -> tuple[Parameters, Method]:
        """The base and the method, by whose decoding acceptance is really measured."""
        weights = jax.tree.map(lambda w: w.astype(frozen.embedding.dtype), trainable)
        heads = self.heads(weights, "", {})
        if self.vocabulary:
            drafted = DraftVocabulary.of(frozen, list(self.vocabulary))
            heads = dataclasses.replace(heads, vocabulary=drafted)
        # Always the same tree: acceptance is to be compared from one evaluation to the next.
        sized = heads.options.get("tree", "auto") in ("auto", "measured")
        options = {"tree": "chain"} if sized else {}
        return frozen, methods.make_method(self.spec.name, options, heads)


def measured(
    objective: HeadsTraining, trainable: Any, base: Parameters, batches: Any, ranks: int = 10
) -> dict[str, Any]:
    """How often the heads are right on held-out batches: the part of a record that trees need.

    Counted in answers alone, whatever `data.loss` learns from: a chat's template is always the same
    and easily guessed, but never decoded. And where they go on as the base itself would, because
    drafts are verified against the base's own tokens: guess i of position n counts where tokens
    n + 1 .. n + i + 1 are the base's.

    Returns:
      "accuracies": [k][ranks], the share of right guesses of each rank, where the token of every
      earlier head was among its guesses; "top1": [k], without that condition; "positions": [k],
      how many were looked at for the former.
    """
    ranks = min(ranks, base.config.vocab_size)
    spec = objective.spec
    ids = {"vocabulary": objective.vocabulary} if objective.vocabulary else {}

    def counted(weights: Any, base: Parameters, batch: Packed) -> dict[str, jax.Array]:
        chunk = objective.chunk_of(batch)
        own, guesses = spec.guesses(weights, base, batch, ranks, chunk=chunk, **ids)
        return _hits(own, guesses, batch.replace(learn=batch.answer))

    count = jax.jit(counted)
    parts = [jax.device_get(count(trainable, base, batch)) for batch in batches]
    total = jax.tree.map(lambda *x: np.sum(x, axis=0, dtype=np.float64), *parts)
    accuracies = total["right"] / np.maximum(total["reached"], 1.0)[:, None]
    top1 = total["right_at_all"] / np.maximum(total["looked_at"], 1.0)
    return {
        # So many digits that shares of one place, rounded, do not add up to more than 1.
        ACCURACIES: [[round(float(x), 8) for x in row] for row in accuracies],
        "top1": [round(float(x), 5) for x in top1],
        "positions": [int(n) for n in total["reached"]],
    }


def _hits(own: jax.Array, guesses: jax.Array, batch: Packed) -> dict[str, jax.Array]:
    """Sums over a batch: [k] or [k, ranks] float32."""
    follows = shifted(batch.tokens, 1) == own
    goes_on = reached = jnp.ones_like(follows)
    sums: dict[str, list[jax.Array]] = {
        name: [] for name in ("right", "reached", "right_at_all", "looked_at")
    }
    for i in range(guesses.shape[2]):
        # Token n + i + 1 is what the base says at position n + i.
        goes_on = goes_on & shifted(follows, i)
        wanted = goes_on & batch.targets(i + 2)[1]
        right = guesses[:, :, i] == shifted(own, i + 1)[..., None]
        looked_at = wanted & reached
        sums["right"].append((right & looked_at[..., None]).sum((0, 1), dtype=jnp.float32))
        sums["reached"].append(looked_at.sum(dtype=jnp.float32))
        sums["right_at_all"].append((right[..., 0] & wanted).sum(dtype=jnp.float32))
        sums["looked_at"].append(wanted.sum(dtype=jnp.float32))
        reached = reached & right.any(axis=-1)
    return {name: jnp.stack(values) for name, values in sums.items()}
