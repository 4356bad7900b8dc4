"""CP heads (arXiv 2410.17765): the next n tokens as a mixture of r products; what is trained.

Expert a (of r) has a head for each step s (of n). All read the normed output e of the last layer at
position t; step s foretells token t + s:

    w = softmax(e A)
    P_a^(s) = softmax((e + e V_as) O)      O: the base's output head, or a matrix of the head's own
    P(x_{t+1} .. x_{t+n}) = sum_a w_a prod_s P_a^(s)(x_{t+s})                     (`cp_mixture`)

The base says token t + 1 itself. Given that token, the mixture's conditionals draft the n - 1
behind it (`cp_drafting`): each draft depends on those before it, which guesses of independent heads
(rank 1) cannot.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any, ClassVar, Literal

import jax
import jax.numpy as jnp
from jax.nn import initializers

from mtd_jax.config import ModelConfig
from mtd_jax.decoding.draft_vocabulary import check_count, cut, numbered
from mtd_jax.decoding.heads import WholeSpec
from mtd_jax.errors import InputError
from mtd_jax.methods import cp_mixture
from mtd_jax.methods.cp_weights import CPWeights
from mtd_jax.parameters import Weight, count, initialize
from mtd_jax.transformer.losses import (
    Totals,
    mapped_over_chunks,
    only_output,
    output_axes,
    output_weights,
    summed_over_chunks,
)
from mtd_jax.transformer.model import Parameters, normed, project
from mtd_jax.transformer.packed import Packed, frozen_rows, packed_hidden, shifted
from mtd_jax.transformer.stack import Remat
from mtd_jax.typing import Array, Bool, DTypeLike, Float, Initializer, Int

_MOST_TOKENS = 16
_MOST_RANK = 64
_NOISE = 0.02
"""Length of e V_as against that of e before the first step. Experts that begin equal stay equal."""


@dataclasses.dataclass(frozen=True)
class CPSpec(WholeSpec):
    """Options of CP heads that say what is trained, and how.

    Raises:
      InputError: a value outside its range, or two that exclude each other.
    """

    tokens: int = 4
    """n: tokens that the mixture covers, the base's own next one among them."""
    rank: int = 4
    """r: experts. 1 is independent linear heads (arXiv 2404.19737)."""
    factor: int = 64
    """k: rank of every V; 0 is whole matrices."""
    own_output: bool = False
    """Each head has an output matrix of its own, which begins as the base's, in place of V."""
    loss: Literal["joint", "distillation"] = "distillation"
    """`joint`: -log P of the text. `distillation`: by step, beta of the divergence from what the
    base says there, the rest the cross-entropy with the text; both of the conditional given the
    true earlier tokens, which is what verification tests (the paper's eq. 14)."""
    beta: float = 0.9
    gamma: float = 1.0
    """Weight of a step's loss against that of the step before it (`distillation`)."""
    balance: float = 0.0
    """c: weight of `cp_mixture.balance`, against one expert doing all the work."""
    trunk: Literal["frozen", "trained"] = "frozen"
    """`trained`: with the heads, from the joint loss; a model of random weights from scratch. What
    is decoded is then the mixture's own first token (the paper's eq. 11)."""
    vocabulary: int = 0
    """As of `RowHeadsSpec`: tables of so many tokens; another one, once it is known, tells nothing
    about the experts, as if its step were left out. 0 is all."""

    name: ClassVar[str] = "cp"

    def __post_init__(self) -> None:
        for name, least, most in (("tokens", 2, _MOST_TOKENS), ("rank", 1, _MOST_RANK)):
            if not least <= getattr(self, name) <= most:
                raise InputError(
                    f"{name} must be between {least} and {most}, got {getattr(self, name)}"
                )
        if self.factor < 0:
            raise InputError(f"factor must be at least 0, got {self.factor}")
        if not 0.0 <= self.beta <= 1.0:
            raise InputError(f"beta must be between 0 and 1, got {self.beta}")
        if not 0.0 < self.gamma <= 1.0:
            raise InputError(f"gamma must be over 0 and at most 1, got {self.gamma}")
        if not 0.0 <= self.balance < math.inf:
            raise InputError(f"balance must be at least 0, got {self.balance}")
        if self.trunk == "trained" and self.loss != "joint":
            raise InputError("trunk=trained leaves no base to distil from: say loss=joint")
        check_count(self.vocabulary, self.loss)
        if self.vocabulary and self.own_output:
            raise InputError("vocabulary does not go with own_output")

    @property
    def depth(self) -> int:
        """The first of the tokens is the base's own."""
        return self.tokens - 1

    def declare(self, config: ModelConfig) -> CPWeights:
        """`Weight`s; with the matrices of `own_output` to be taken from the base."""
        width, heads = config.hidden_size, (self.rank, self.tokens)
        gate = Weight((width, self.rank), ("embed", None), initializers.zeros)
        if self.own_output:
            shape = (*heads, width, config.vocab_size)
            return CPWeights(gate, output=Weight(shape, (None, None, "embed", "vocab"), _noise()))
        inner = min(self.factor, width)
        if not inner:
            whole = Weight((width, *heads, width), ("embed", None, None, None), _noise(axis=0))
            return CPWeights(gate, down=whole)
        return CPWeights(
            gate,
            # Of length one, so that the second factor alone says how far a row is moved.
            down=Weight((width, *heads, inner), ("embed", None, None, None), _noise(1.0, axis=0)),
            up=Weight((*heads, inner, width), (None, None, None, "embed"), _noise()),
        )

    def initial(self, base: Parameters, key: jax.Array) -> CPWeights:
        """Heads that nearly say what the base says, and differ a little."""
        weights = initialize(self.declare(base.config), key)
        if not self.own_output:
            return weights
        head = (base.embedding.T if base.head is None else base.head).astype(jnp.float32)
        scale = jnp.sqrt(jnp.mean(jnp.square(head), axis=0)) * math.sqrt(head.shape[0])
        return weights.replace(output=head[None, None] + weights.output * scale[None, None, None])

    def counts(self, batch: Packed) -> Totals:
        """Positions that learn: at all ("loss"), every step ("joint"), and each step."""
        real = self._targets(batch)[1]
        steps = real.sum(axis=(0, 1), dtype=jnp.float32)
        named = {f"step_{s + 1}": steps[s] for s in range(self.tokens)}
        return {"loss": steps[0], "joint": steps[-1], **named}

    def training_loss(
        self,
        weights: CPWeights,
        base: Parameters,
        batch: Packed,
        counts: Totals,
        *,
        chunk: int,
        vocabulary: tuple[int, ...] = (),
    ) -> tuple[jax.Array, Totals]:
        """`mixture_loss` on the rows of a base that stays."""
        base = jax.lax.stop_gradient(base)
        e = normed(base, frozen_rows(base, batch))
        return self.mixture_loss(
            weights, base, e, batch, counts, chunk=chunk, frozen=True, vocabulary=vocabulary
        )

    def mixture_loss(
        self,
        weights: CPWeights,
        params: Parameters,
        e: Float[Array, "B T D"],
        batch: Packed,
        counts: Totals,
        *,
        chunk: int,
        frozen: bool,
        vocabulary: tuple[int, ...] = (),
    ) -> tuple[jax.Array, Totals]:
        """The loss, and what is measured: the joint's, each conditional's, and experts' usage.

        A position near the end of its document learns the steps that it has, so that ends are
        learned too: the others are summed out. "joint" measures whole positions alone.

        Tables [C, r, n, V] exist for C positions at a time, r n times fewer than `chunk`: memory
        grows neither with the rank nor with the number of tokens. No table is computed twice; what
        a base says of a position is, for each step that foretells it.

        Args:
          e: rows behind the final norm.
          frozen: no gradient is wanted for the output head of `params`.
          vocabulary: ids, of which alone both the base and the heads say the next.
        """
        targets, real = self._targets(batch)
        params, targets = _narrowed(params, targets, vocabulary)
        config, distils = params.config, self.loss == "distillation"
        later = [shifted(e, s) for s in range(self.tokens)] if distils else []
        teacher = jnp.stack(later, axis=2) if distils else ()

        def loss(weights: Any, e: Array, data: Any) -> Totals:
            own, output = weights
            reader = only_output(config, jax.lax.stop_gradient(output) if frozen else output)

            def step(log_pi: Array, part: Any) -> tuple[Array, tuple[Array, Array]]:
                heads, target, real, teacher = part
                log_p = heads.log_p(reader, e)[..., 0, :]
                target = jnp.where(real, target, -1)
                log_q, after = cp_mixture.told(log_pi, cp_mixture.found(log_p, target))
                kl = jnp.zeros_like(log_q)
                if distils:
                    wanted = jax.nn.log_softmax(project(jax.lax.stop_gradient(reader), teacher))
                    gap = wanted - cp_mixture.mixed(log_pi, log_p)
                    kl = jnp.where(real, (jnp.exp(wanted) * gap).sum(axis=-1), 0.0)
                return after, (-log_q, kl)

            parts = jax.tree.map(lambda x: jnp.moveaxis(x, 2, 0), data)
            log_pi, (nll, kl) = jax.lax.scan(step, own.log_w(e), (own.by_step(), *parts))
            real = data[1]
            learns, whole = real[..., 0], real[..., -1]
            share = jnp.where(learns[..., None], jnp.exp(log_pi), 0.0)
            total = nll.sum()
            if distils:
                decay = self.gamma ** jnp.arange(self.tokens, dtype=jnp.float32)[:, None, None]
                total = (decay * (self.beta * kl + (1 - self.beta) * nll)).sum()
            return {
                "loss": total,
                "joint": jnp.where(whole, nll.sum(axis=0), 0.0).sum(),
                **{f"conditional_{s + 1}": nll[s].sum() for s in range(self.tokens)},
                **{f"expert_{a + 1}": share[..., a].sum() for a in range(self.rank)},
            }

        axes = tuple(weight.axes for weight in jax.tree.leaves(self.declare(config)))
        found = summed_over_chunks(
            loss,
            (weights, output_weights(params)),
            e,
            (targets, real, teacher),
            max(1, chunk // (self.rank * self.tokens)),
            axes + output_axes(config),
        )
        return self._measured(found, weights.log_w(e), real[..., 0], counts)

    def guesses(
        self,
        weights: CPWeights,
        base: Parameters,
        batch: Packed,
        ranks: int,
        *,
        chunk: int,
        vocabulary: tuple[int, ...] = (),
    ) -> tuple[Int[Array, "B T"], Int[Array, "B T k ranks"]]:
        """Of every position, given the text's own tokens before each guess."""
        e = normed(base, frozen_rows(base, batch))
        reader, targets = _narrowed(base, self._targets(batch)[0], vocabulary)

        def of_chunk(rows: tuple[Array, Array]) -> tuple[Array, Array]:
            e, targets = rows

            def step(log_pi: Array, part: Any) -> tuple[Array, Array]:
                heads, target = part
                log_p = heads.log_p(reader, e)[..., 0, :]
                best = jax.lax.top_k(cp_mixture.mixed(log_pi, log_p), ranks)[1]
                return cp_mixture.seen(log_pi, log_p, target), best.astype(jnp.int32)

            parts = weights.by_step(), jnp.moveaxis(targets, 2, 0)
            _, best = jax.lax.scan(step, weights.log_w(e), parts)
            own = best[0][..., 0]  # the mixture's first token, which is what is decoded
            if self.trunk == "frozen":
                own = jnp.argmax(project(base, e), axis=-1).astype(jnp.int32)
            best = jnp.moveaxis(best[1:], 0, 2)
            return own, jnp.asarray(vocabulary, jnp.int32)[best] if vocabulary else best

        return mapped_over_chunks(of_chunk, (e, targets), max(1, chunk // self.rank))

    def whole_loss(
        self,
        weights: CPWeights,
        params: Parameters,
        batch: Packed,
        counts: Totals,
        *,
        chunk: int,
        remat: Remat,
    ) -> tuple[jax.Array, Totals]:
        """`mixture_loss` on rows that the backward pass goes through."""
        e = normed(params, packed_hidden(params, batch, remat=remat))
        return self.mixture_loss(weights, params, e, batch, counts, chunk=chunk, frozen=False)

    def whole_flops(self, config: ModelConfig) -> float:
        """As `flops`, and 2 for the gradient of what the heads read with."""
        return 1.5 * self.flops(config)

    def flops(self, config: ModelConfig) -> float:
        """2 for each weight forward, 2 for its gradient, 2 for the row's where that is wanted."""
        wide = self.vocabulary or config.vocab_size
        output = config.hidden_size * wide * self.rank * self.tokens
        own = count(self.declare(config))
        return 4.0 * own if self.own_output else 4.0 * own + 4.0 * output

    def _targets(self, batch: Packed) -> tuple[Int[Array, "B T n"], Bool[Array, "B T n"]]:
        """The next n tokens, and whether each is to be learned, with all before it."""
        tokens, wanted = zip(*(batch.targets(s + 1) for s in range(self.tokens)), strict=True)
        real = jnp.cumprod(jnp.stack(wanted, axis=2).astype(jnp.int32), axis=2) > 0
        return jnp.stack(tokens, axis=2), real

    def _measured(
        self,
        found: Totals,
        log_w: Float[Array, "B T r"],
        learns: Bool[Array, "B T"],
        counts: Totals,
    ) -> tuple[jax.Array, Totals]:
        """Means; of what is no mean of positions, the part that the batch has in them."""
        positions = jnp.maximum(counts["loss"], 1.0)
        part = learns.sum(dtype=jnp.float32) / positions
        loss = found["loss"] / positions
        if self.balance:
            loss = loss + self.balance * part * cp_mixture.balance(log_w, learns)
        usage = jnp.where(learns[..., None], jnp.exp(log_w), 0.0).sum(axis=(0, 1))
        steps = [f"step_{s + 1}" for s in range(self.tokens)]
        experts = jnp.stack([found[f"expert_{a + 1}"] for a in range(self.rank)])
        return loss, {
            "loss": loss,
            "joint": found["joint"] / jnp.maximum(counts["joint"], 1.0),
            **{
                f"conditional_{s + 1}": found[f"conditional_{s + 1}"]
                / jnp.maximum(counts[name], 1.0)
                for s, name in enumerate(steps)
            },
            "usage_entropy": part * cp_mixture.entropy(usage),
            "responsibility_entropy": part * cp_mixture.entropy(experts),
            **{f"responsibility_{a + 1}": experts[a] / positions for a in range(self.rank)},
        }


def _narrowed(
    base: Parameters, targets: Int[Array, "B T n"], vocabulary: tuple[int, ...]
) -> tuple[Parameters, Int[Array, "B T n"]]:
    """The base whose output head says these tokens alone; where they stand in it, others at -1."""
    if not vocabulary:
        return base, targets
    numbers = jnp.asarray(numbered(vocabulary, base.config.vocab_size))
    return cut(base, vocabulary), numbers[targets]


def _noise(length: float = _NOISE, axis: int = -2) -> Initializer:
    """Normal, so that a product over `axis` changes the length of a row by this factor."""

    def draw(key: jax.Array, shape: tuple[int, ...], dtype: DTypeLike) -> jax.Array:
        scale = length / math.sqrt(shape[axis])
        return scale * jax.random.normal(key, shape, dtype)

    return draw
