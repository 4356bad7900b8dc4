"""Hidden Transfer (arXiv 2404.12022): rows of tokens to come, made of a row half way up the layers.

At layer t_i a linear map makes of the hidden state h_n of token n a *pseudo* state of token n + i,
which passes the layers behind it like any other row, at the position n + i, and comes out as a
guess at token n + i + 1; i = 1..k:

    p_(n,i) = h_n + h_n W_i           h_n: what the first t_i layers put out; W_i begins at zero

(The paper's map is I + W_i.) A pseudo row sees the text up to n and the earlier pseudo rows of the
same n. No row of the text sees a pseudo row, so the base says what it always says: the guesses are
drafts, and verifying them is lossless. Two steps, t_1 = 2 and t_2 = 3, of four layers:

    layer        0    1    2    3    out
    text n       o    o    o    o    token n + 1, exact
    (n, 1)                 o    o    token n + 2, a guess
    (n, 2)                      o    token n + 3, a guess

Two schedules give the same guesses. `all`, the paper's: every node of the tree that a step verifies
carries its pseudo rows through the same pass. `accepted`: the tree is verified first; only the last
node that was kept then sends its pseudo rows through the upper layers, which are read again.
"""

from __future__ import annotations

import functools
from typing import Any, ClassVar, Literal, TypeAlias

import jax
import jax.numpy as jnp
from flax import struct

from mtd_jax.config import ModelConfig
from mtd_jax.decoding.draft_vocabulary import DraftVocabulary, bytes_read, likeliest
from mtd_jax.decoding.heads import Heads
from mtd_jax.decoding.method import Extend
from mtd_jax.decoding.speculative import Acceptance
from mtd_jax.decoding.traffic import weight_bytes
from mtd_jax.decoding.tree import TokenTree
from mtd_jax.methods.drafting import RowDrafting, choose_trees
from mtd_jax.methods.transfer import HiddenTransferSpec, TransferWeights, Way
from mtd_jax.parameters import size_in_bytes
from mtd_jax.transformer.cache import KVCache
from mtd_jax.transformer.model import Parameters, embed, normed, rows_behind, unembed
from mtd_jax.transformer.stack import Skip, decode_range
from mtd_jax.typing import Array, Float, Int

Schedule: TypeAlias = Literal["all", "accepted"]


class HiddenTransfer(RowDrafting):
    """See the module's docstring; made by `methods.hidden_transfer`.

    What is known of a row between two steps, one behind the other in one array [B, W]: what the
    last layer put out, what each transfer layer was given, and, with `all`, what the last layer
    made of the k pseudo rows; zeros, where those have not passed the layers yet.
    """

    weights: TransferWeights
    vocabulary: DraftVocabulary | None
    spec: HiddenTransferSpec = struct.field(pytree_node=False)
    pseudo: Schedule = struct.field(pytree_node=False)

    name: ClassVar[str] = HiddenTransferSpec.name

    def partial_bytes(self, params: Parameters, cached: float) -> float:
        """The maps and the output head; with `accepted` the upper layers as well."""
        config = params.config
        layers = range(config.num_layers)
        below = layers if self.pseudo == "all" else layers[: self._way(config).marks[0]]
        left_out = Skip(attention=frozenset(below), mlp=frozenset(below))
        kept = 1 - len(below) / len(layers)
        # The output head is among the latter whole.
        whole, part = (bytes_read(v, params) for v in (None, self.vocabulary))
        read = weight_bytes(params, left_out) - whole + part
        return size_in_bytes(self.weights) + read + kept * cached

    def check(self, config: ModelConfig, cycles: frozenset[int]) -> str | None:
        """Needs the layers that its maps stand at."""
        self._way(config)
        return super().check(config, cycles)

    def walk(self, tree: TokenTree | None) -> Extend:
        """As in any decoder; with `all` the nodes of a tree carry their pseudo rows along.

        A step that verifies nothing carries none: whether drafts are wanted behind it is not known.
        """
        carries = self.pseudo == "all" and tree is not None and tree.size > 1
        return functools.partial(self._extend, carries=carries)

    def width(self, config: ModelConfig) -> int:
        """The last layer's output, what the transfer layers were given, and pseudo rows."""
        carried = self.weights.count if self.pseudo == "all" else 0
        return config.hidden_size * (1 + len(self._way(config).marks) + carried)

    def guesses(
        self, params: Parameters, row: Float[Array, "B W"], ranks: int, cache: KVCache
    ) -> Int[Array, "B depth ranks"]:
        """The likeliest tokens of every step."""
        rows = normed(params, self.pseudo_rows(params, row, cache))
        return likeliest(self.vocabulary, params, rows, ranks)

    def logits(
        self, params: Parameters, row: Float[Array, "B W"], cache: KVCache
    ) -> Float[Array, "B k V"]:
        """Float32 logits of every step behind the last token of the `cache`, of which `row` is."""
        return unembed(params, self.pseudo_rows(params, row, cache))

    def pseudo_rows(
        self, params: Parameters, row: Float[Array, "B W"], cache: KVCache
    ) -> Float[Array, "B k D"]:
        """What the last layer makes of them."""
        config = params.config
        batch, width = row.shape[0], config.hidden_size
        parts = row.reshape(batch, -1, width)
        taps = len(self._way(config).marks)
        tapped, carried = parts[:, 1 : 1 + taps], parts[:, 1 + taps :]

        def passed() -> Float[Array, "B k D"]:
            return self._passed(params, tapped, cache)

        if self.pseudo == "all":
            return jax.lax.cond(jnp.any(carried != 0), lambda: carried, passed)
        return passed()

    def _way(self, config: ModelConfig) -> Way:
        return self.spec.way(config).first(self.weights.count)

    def _extend(
        self,
        params: Parameters,
        cache: KVCache,
        tokens: Int[Array, "B T"],
        *,
        carries: bool,
        **options: Any,
    ) -> tuple[Float[Array, "B T W"], KVCache]:
        """`model.extend`, whose rows have behind them what `HiddenTransfer` says."""
        config, way, count = params.config, self._way(params.config), tokens.shape[1]
        rows, slots = rows_behind(config, cache, count, **options)
        through = functools.partial(decode_range, config, params.blocks, rows=rows, slots=slots)
        x, cache = through(cache, embed(params, tokens), 0, way.marks[0])
        found: list[jax.Array] = []
        pseudo = None
        for start, stop in way.stages(config):
            found.append(x)
            if not carries:
                x, cache = through(cache, x, start, stop)
                continue
            pseudo = way.entered(self.weights, x, pseudo, start)
            beside = way.beside(config, start, rows.positions, rows.mask, rows.keys)
            both = jnp.concatenate([x, _flat(pseudo)], axis=1)
            both, cache = through(cache, both, start, stop, beside=beside)
            x, pseudo = both[:, :count], both[:, count:].reshape(pseudo.shape)
        if carries and pseudo is not None:
            found.append(pseudo.reshape(*pseudo.shape[:2], -1))
        out = jnp.concatenate([x, *found], axis=-1)
        return jnp.pad(out, ((0, 0), (0, 0), (0, self.width(config) - out.shape[-1]))), cache

    def _passed(
        self, params: Parameters, tapped: Float[Array, "B taps D"], cache: KVCache
    ) -> Float[Array, "B k D"]:
        """What the last layer makes of the pseudo rows of the last token of a cache.

        Their keys and values are not kept: the cache is only looked at.
        """
        config, way = params.config, self._way(params.config)
        rows, slots = rows_behind(config, cache, 0)
        last = cache.length[:, None] - 1
        text = (rows.keys <= last)[:, None]
        pseudo = None
        for number, (start, stop) in enumerate(way.stages(config)):
            pseudo = way.entered(self.weights, tapped[:, number, None], pseudo, start)
            beside = way.beside(config, start, last, text, rows.keys)
            x, _ = decode_range(
                config,
                params.blocks,
                cache,
                _flat(pseudo),
                start,
                stop,
                rows=rows,
                slots=slots,
                beside=beside,
            )
            pseudo = x.reshape(pseudo.shape)
        assert pseudo is not None  # there is a step at least
        return pseudo[:, 0]


def make(
    spec: HiddenTransferSpec,
    heads: Heads,
    *,
    tree: str = "auto",
    pseudo: Schedule = "accepted",
    acceptance: Acceptance = "exact",
    copy: bool = False,
) -> HiddenTransfer:
    """The method with these heads; `methods.hidden_transfer` says what the options mean."""
    trees = choose_trees(tree, spec.depth, heads.accuracies)
    return HiddenTransfer(
        **trees.fields(acceptance, copy),
        weights=heads.weights.first(trees.depth),
        vocabulary=heads.vocabulary,
        spec=spec,
        pseudo=pseudo,
    )


def _flat(pseudo: Float[Array, "B N A D"]) -> Float[Array, "B NA D"]:
    return pseudo.reshape(pseudo.shape[0], -1, pseudo.shape[-1])
