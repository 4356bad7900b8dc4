"""Independent heads (arXiv 2404.19737): layers of their own on the trunk, each for one more place.

The trunk is all layers but the last. The last one is the base's head: it says token n + 1. Beside
it stand k layers of the same shape; head i (from 0) says token n + i + 2 from the same input z:

    h_i = layer_i(z_0 .. z_n)          begins as a copy of the base's last layer
    p_i = softmax(norm(h_i) O)         norm and O: the base's

The paper trains all of it from nothing (`trunk = "trained"`), by the plain sum of all
cross-entropies, that of the next token among them (eq. 2); or the base stays, and the heads' own
are summed. Heads are trained one after another, each from z anew, so that the activations of one
exist at a time (section 2).

When decoding, keys and values of the heads lie behind the base's in the same cache, as if it had k
more layers: every row passes them all, and the newest row's guesses are there with it.
"""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar, Literal

import jax
import jax.numpy as jnp

from mtd_jax.config import ModelConfig
from mtd_jax.decoding.draft_vocabulary import DraftVocabulary, bytes_read, likeliest
from mtd_jax.decoding.heads import Heads, WholeSpec
from mtd_jax.decoding.method import Extend
from mtd_jax.decoding.speculative import Acceptance
from mtd_jax.decoding.tree import TokenTree
from mtd_jax.errors import InputError
from mtd_jax.methods.drafting import RowDrafting, choose_trees
from mtd_jax.methods.row_heads import RowHeadsSpec
from mtd_jax.parameters import count, size_in_bytes
from mtd_jax.transformer import block
from mtd_jax.transformer.block import Block
from mtd_jax.transformer.cache import KVCache
from mtd_jax.transformer.losses import Totals, cross_entropy
from mtd_jax.transformer.model import Parameters, embed, normed, rows_behind
from mtd_jax.transformer.packed import Packed, packed_rows
from mtd_jax.transformer.stack import Remat, Rows, decode_range, frozen_range, train_stack
from mtd_jax.typing import Array, Float, Int

_NEXT = "next"
"""The base's own part of the loss, where it is trained too."""


@dataclasses.dataclass(frozen=True)
class IndependentHeadsSpec(RowHeadsSpec, WholeSpec):
    """Options of independent heads that say what is trained, and how.

    Raises:
      InputError: a value outside its range.
    """

    loss: Literal["cross_entropy", "distillation"] = "cross_entropy"
    decay: float = 1.0
    trunk: Literal["frozen", "trained"] = "frozen"
    """`trained`: all weights, with the heads; a model of random weights from scratch."""

    name: ClassVar[str] = "independent_heads"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.trunk == "trained" and self.loss != "cross_entropy":
            raise InputError("trunk=trained leaves no base to distil from: say loss=cross_entropy")

    def declare(self, config: ModelConfig) -> Block:
        """The heads as one stack of layers."""
        return block.declare(_with_heads(config, self.count))

    def initial(self, base: Parameters, key: jax.Array) -> Block:
        """Copies of the last layer."""
        del key
        blocks = base.blocks
        last = blocks[-1] if isinstance(blocks, tuple) else jax.tree.map(lambda w: w[-1], blocks)
        return jax.tree.map(
            lambda w: jnp.broadcast_to(w.astype(jnp.float32), (self.count, *w.shape)), last
        )

    def rows(
        self, weights: Block, base: Parameters, batch: Packed
    ) -> tuple[Float[Array, "B T D"], Float[Array, "B T k D"]]:
        """Of the base and of every head, behind the final norm."""
        config, last = base.config, base.config.num_layers - 1
        rows = packed_rows(config, batch)
        x = embed(base, batch.tokens)
        z = frozen_range(config, base.blocks, x, 0, last, rows=rows)
        h = frozen_range(config, base.blocks, z, last, last + 1, rows=rows)
        return normed(base, h), normed(base, _beside_the_last(config, weights, z, rows))

    def counts(self, batch: Packed) -> Totals:
        """And where the trunk is trained, the tokens that the base itself is to say."""
        found = super().counts(batch)
        if self.trunk == "frozen":
            return found
        own = batch.targets(1)[1].sum(dtype=jnp.float32)
        return {**found, "loss": found["loss"] + own, _NEXT: own}

    def whole_loss(
        self,
        weights: Block,
        params: Parameters,
        batch: Packed,
        counts: Totals,
        *,
        chunk: int,
        remat: Remat,
    ) -> tuple[jax.Array, Totals]:
        """The next token's cross-entropy and the heads', of trunk and heads together (eq. 2).

        The gradients of the heads meet at z one after another: no two heads' activations, nor the
        logits of more than a chunk, exist at a time.
        """
        config, last = params.config, params.config.num_layers - 1
        rows = packed_rows(config, batch)

        def layers(start: int, stop: int, x: Array) -> Array:
            some = jax.tree.map(lambda w: w[start:stop], params.blocks)
            part = _with_heads(config, stop - start, first=start)
            return train_stack(part, some, x, rows=rows, remat=remat)[0]

        z = layers(0, last, embed(params, batch.tokens)) if last else embed(params, batch.tokens)
        h = normed(params, layers(last, last + 1, z))
        found = normed(params, _beside_the_last(config, weights, z, rows))
        numbers = {name: jnp.maximum(number, 1.0) for name, number in counts.items()}
        own = cross_entropy(params, h, *batch.targets(1), chunk=chunk, normed=True)
        named = [numbers[f"head_{i + 1}"] for i in range(self.count)]
        shares = [self.decay**i / number for i, number in enumerate(named)]
        readers = (params,) * self.count
        loss, right = self.cross_entropies(readers, found, batch, shares, chunk=chunk)
        following = own["loss"] / numbers[_NEXT]
        measured = {f"accuracy_{i + 1}": right[i] / number for i, number in enumerate(named)}
        return following + loss, {"loss": following + loss, _NEXT: following, **measured}

    def whole_flops(self, config: ModelConfig) -> float:
        """6 for each weight of the heads, and of the output head for each of them and the base."""
        output = config.hidden_size * config.vocab_size * (1 + self.count)
        return 6.0 * (count(self.declare(config)) + output)

    def flops(self, config: ModelConfig) -> float:
        """2 for each weight forward, 2 for its gradient, 2 for the rows within a head."""
        output = config.hidden_size * self.tokens(config) * self.count
        return 6.0 * count(self.declare(config)) + 4.0 * output


class IndependentHeads(RowDrafting):
    """See the module's docstring; made by `methods.independent_heads`."""

    heads: tuple[Block, ...]
    """A layer each."""
    vocabulary: DraftVocabulary | None

    name: ClassVar[str] = IndependentHeadsSpec.name

    def partial_bytes(self, params: Parameters, cached: float) -> float:
        """The heads, which every pass runs, and the output head once more."""
        return size_in_bytes(self.heads) + bytes_read(self.vocabulary, params)

    def width(self, config: ModelConfig) -> int:
        """The last layer's output and the heads'."""
        return config.hidden_size * (1 + len(self.heads))

    def cached(self, config: ModelConfig) -> ModelConfig:
        """The heads leave keys and values too."""
        return _with_heads(config, config.num_layers + len(self.heads))

    def walk(self, tree: TokenTree | None) -> Extend:
        """Through the heads too, on every tree: what is kept of it leaves keys and values."""
        return self._extend

    def guesses(
        self, params: Parameters, row: Float[Array, "B W"], ranks: int, cache: KVCache
    ) -> Int[Array, "B depth ranks"]:
        """The likeliest tokens of every head."""
        rows = row.reshape(row.shape[0], -1, params.config.hidden_size)[:, 1:]
        return likeliest(self.vocabulary, params, normed(params, rows), ranks)

    def _extend(
        self,
        params: Parameters,
        cache: KVCache,
        tokens: Int[Array, "B T"],
        **options: Any,
    ) -> tuple[Float[Array, "B T W"], KVCache]:
        """`model.extend`, with the heads' output behind the base's in every row."""
        base = cache.k.shape[0] - len(self.heads)
        config = _with_heads(params.config, cache.k.shape[0])
        rows, slots = rows_behind(config, cache, tokens.shape[1], **options)

        def through(
            blocks: Any, cache: KVCache, x: jax.Array, start: int, stop: int
        ) -> tuple[jax.Array, KVCache]:
            return decode_range(config, blocks, cache, x, start, stop, rows=rows, slots=slots)

        z, cache = through(params.blocks, cache, embed(params, tokens), 0, base - 1)
        x, cache = through(params.blocks, cache, z, base - 1, base)
        found = [x]
        for place, head in enumerate(self.heads, start=base):
            # Found by its number among all layers, of which it is the only one that runs.
            x, cache = through((head,) * (place + 1), cache, z, place, place + 1)
            found.append(x)
        return jnp.concatenate(found, axis=-1), cache


def make(
    spec: IndependentHeadsSpec,
    heads: Heads,
    *,
    tree: str = "auto",
    acceptance: Acceptance = "exact",
    copy: bool = False,
) -> IndependentHeads:
    """The method with these heads; `methods.independent_heads` says what the options mean."""
    trees = choose_trees(tree, spec.depth, heads.accuracies)
    return IndependentHeads(
        **trees.fields(acceptance, copy),
        heads=block.unstack(heads.weights)[: trees.depth],
        vocabulary=heads.vocabulary,
    )


def _beside_the_last(
    config: ModelConfig, weights: Block, z: Float[Array, "B T D"], rows: Rows
) -> Float[Array, "B T k D"]:
    """What every head makes of z: a scan, in whose backward pass each is computed again, alone."""
    alone = _with_heads(config, 1, first=config.num_layers - 1)

    def head(_: None, layer: Block) -> tuple[None, Array]:
        stack = jax.tree.map(lambda w: w[None].astype(z.dtype), layer)
        return None, train_stack(alone, stack, z, rows=rows, remat="layer")[0]

    _, found = jax.lax.scan(head, None, weights)
    return jnp.moveaxis(found, 0, 2)


def _with_heads(config: ModelConfig, layers: int, first: int = 0) -> ModelConfig:
    """The model's config with `layers` layers from `first` on; all behind its last are as that."""
    windows = config.sliding_windows
    if windows is not None:
        longer = windows + windows[-1:] * (first + layers)
        windows = longer[first : first + layers]
    return dataclasses.replace(config, num_layers=layers, sliding_windows=windows, cycles=None)
