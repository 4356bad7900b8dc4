"""What methods share whose heads draft from one row: trees, adaptation, verification.

The row is what the layers put out at the newest token that was verified. All drafts of a step come
from it: a few guesses for each of the next places, which a static tree combines.
"""

from __future__ import annotations

import abc
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from mtd_jax import backend
from mtd_jax.config import ModelConfig
from mtd_jax.decoding.adaptive import Yields, best_tree_index, urgency
from mtd_jax.decoding.base_method import BaseMethod
from mtd_jax.decoding.method import DecodeState, Extend, Requests
from mtd_jax.decoding.prompt import read_prompt
from mtd_jax.decoding.row_trees import AnyTree, in_rows
from mtd_jax.decoding.speculative import Acceptance, in_place_switch, verify_drafts
from mtd_jax.decoding.tree import TokenTree, build_tree
from mtd_jax.errors import InputError
from mtd_jax.methods.copies import Copies, copier_of
from mtd_jax.methods.ngram import NGram
from mtd_jax.transformer.cache import KVCache
from mtd_jax.transformer.model import Parameters, extend
from mtd_jax.typing import Array, Bool, Float, Int, Leaf

# Medusa on Vicuna 7B (arXiv 2401.10774): what a chain may hope for before anybody has measured.
_PUBLISHED = (0.56, 0.316, 0.201, 0.147, 0.118)


class Trees(NamedTuple):
    """The trees that a step may verify."""

    trees: tuple[TokenTree, ...]
    expected: np.ndarray
    costs: np.ndarray
    auto: bool

    @property
    def depth(self) -> int:
        """Places that heads are needed for; 1 where there are no drafts."""
        return max(1, *(tree.max_depth for tree in self.trees))

    def fields(self, acceptance: Acceptance, copy: bool = False) -> dict[str, Any]:
        """Those of `TreeDrafting`; with `copy` drafts may be copied from the text as well."""
        costs, expected = jnp.asarray(self.costs), jnp.asarray(self.expected)
        return {
            "costs": costs,
            "expected": expected,
            "trees": self.trees,
            "acceptance": acceptance,
            "auto": self.auto,
            "copier": copier_of(tuple(tree.size for tree in self.trees)) if copy else None,
        }


class Known(struct.PyTreeNode):
    """What a method keeps between steps."""

    row: Leaf
    """[B, W]: what `extend` put out at the token before the pending one."""
    yields: Yields
    rates: Any
    """`AcceptanceRates`: how often copies are right; None where nothing is copied."""


class Guessed(Known):
    """And what it guessed at the end of a step."""

    guesses: Leaf
    """[B, depth, ranks] int32: candidates for the places behind the pending token; -1 is none."""


class TreeDrafting(BaseMethod):
    """A method whose drafts hang on trees of static sizes: a step verifies the one that pays."""

    costs: Any
    """[trees] float32: what a step with each tree costs, in any unit."""
    expected: Any
    """[trees] float32: drafts of each tree that are accepted on average."""
    trees: tuple[TokenTree, ...] = struct.field(pytree_node=False)
    """What a step may verify, ascending in size."""
    acceptance: Acceptance = struct.field(pytree_node=False)
    auto: bool = struct.field(pytree_node=False)
    """Whether `costs` are to be measured and the tree follows from them."""
    copier: NGram | None
    """What finds drafts in the text, beside those of the heads."""

    @property
    def lossless(self) -> bool:
        """Unless acceptance is `typical`."""
        return self.acceptance == "exact"

    @property
    def sizes(self) -> tuple[int, ...]:
        """Rows that a step may have."""
        return tuple(tree.size for tree in self.trees)

    @property
    def depth(self) -> int:
        """Places behind the pending token that are drafted."""
        return max(tree.max_depth for tree in self.trees)

    @property
    def ranks(self) -> int:
        """Guesses that are made for each place."""
        return max(1 + int(tree.rank.max()) for tree in self.trees)

    @property
    def max_emit(self) -> int:
        """All drafts of a path and the bonus token; copies form chains of all of a step's rows."""
        return self.depth + 1 if self.copier is None else self.sizes[-1]

    @property
    def rows_per_step(self) -> int:
        """Every node takes a cache slot."""
        return self.sizes[-1]

    @abc.abstractmethod
    def proposed(
        self, params: Parameters, state: DecodeState, tree: TokenTree
    ) -> tuple[AnyTree, Int[Array, "B drafts"]]:
        """What the heads draft behind the pending token: as many drafts as `tree` has; -1 is none.

        They hang on `tree`, or on trees of the rows' own, no deeper than that.
        """

    def walk(self, tree: TokenTree | None) -> Extend:
        """How the rows of a tree (None: of a prompt) pass the layers."""
        return extend

    def verified(
        self,
        params: Parameters,
        state: DecodeState,
        tree: TokenTree,
        copies: Copies | None,
        copying: Bool[Array, " B"],
    ) -> DecodeState:
        """The state behind a pass over this tree; `Known.row` is what the newest token is from."""
        shaped: AnyTree = tree
        if tree.size == 1:
            drafts = jnp.zeros((state.pending.shape[0], 0), jnp.int32)
        elif copies is None:
            shaped, drafts = self.proposed(params, state, tree)
        else:
            shaped, drafts = self._mixed(params, state, tree, copies, copying)
        state, seen = verify_drafts(
            params,
            state,
            shaped,
            drafts,
            acceptance=self.acceptance,
            extend=self.walk(tree),
            output=self.output,
        )
        return state.replace(extra=state.extra.replace(row=seen.last_row))

    def _mixed(
        self,
        params: Parameters,
        state: DecodeState,
        tree: TokenTree,
        copies: Copies,
        copying: Bool[Array, " B"],
    ) -> tuple[AnyTree, Int[Array, "B drafts"]]:
        """Copies in the rows that copy; if all do, the heads are not asked."""

        def asked() -> tuple[AnyTree, Int[Array, "B drafts"]]:
            shaped, drafts = self.proposed(params, state, tree)
            return copies.in_place_of(shaped, drafts, copying)

        def copied() -> tuple[AnyTree, Int[Array, "B drafts"]]:
            nothing = jnp.full((len(copying), tree.size - 1), -1, jnp.int32)
            return copies.in_place_of(in_rows(tree), nothing, copying)

        return jax.lax.cond(jnp.any(state.active & ~copying), asked, copied)

    def drafted(
        self, params: Parameters, state: DecodeState, asked: Bool[Array, ""]
    ) -> DecodeState:
        """Drafts for the next step; here none, for methods that draft when they verify.

        Args:
          asked: whether this step's drafts were of the heads, in any row.
        """
        return state.replace(partial=((state.drafted > 0) & asked).astype(jnp.int32))

    def kept(
        self,
        params: Parameters,
        last: Float[Array, "B W"],
        cache: KVCache,
        requests: Requests,
    ) -> Known:
        """The prompt's last row, before anything is known."""
        batch = last.shape[0]
        rates = None if self.copier is None else self.copier.rates(batch)
        return Known(row=last, yields=Yields.empty(batch), rates=rates)

    def step(self, params: Parameters, state: DecodeState) -> DecodeState:
        """Verifies the tree that pays and drafts from the last token that was kept."""
        before: Known = state.extra
        copies = None
        if self.copier is not None:
            copies = Copies.found(self.copier, before.rates, state, self.sizes)
        guessed = self.hoped(before.yields)
        hoped = guessed if copies is None else jnp.maximum(guessed, copies.hoped)
        index = self.choice(hoped, state)
        copying = hoped[index] > guessed[index]

        passes = [
            functools.partial(self.verified, params, tree=tree, copies=copies, copying=copying)
            for tree in self.trees
        ]
        state = in_place_switch(index, passes, state)
        accepted = jnp.maximum(state.emitted_count - 1, 0)
        by_heads = (state.drafted > 0) & ~copying
        expected = jnp.where(by_heads, self.expected[index], 0.0)
        yields = before.yields.after(jnp.where(by_heads, accepted, 0), expected)
        extra = state.extra.replace(yields=yields)
        if copies is not None:
            rates = copies.after(before.rates, state.drafted, accepted, copying)
            extra = extra.replace(rates=rates)
        asked = jnp.any(state.active & ~copying)
        return self.drafted(params, state.replace(extra=extra), asked)

    def hoped(self, yields: Yields) -> Float[Array, "trees B"]:
        """Drafts of the heads on each of `trees` that are expected to be accepted."""
        expected: jax.Array = self.expected
        return expected[:, None] * yields.ratio()[None, :]

    def choice(self, hoped: Float[Array, "trees B"], state: DecodeState) -> Int[Array, ""]:
        """Which of `trees` pays for the rows that are active."""
        wanted = state.requests.budget
        return best_tree_index(hoped, self.costs, urgency(state.active, wanted), wanted)


class RowDrafting(TreeDrafting):
    """A method whose drafts are made of the newest row alone, by `guesses`, at the end of a step.

    Only if the next step will verify any.
    """

    @abc.abstractmethod
    def guesses(
        self, params: Parameters, row: Float[Array, "B W"], ranks: int, cache: KVCache
    ) -> Int[Array, "B depth ranks"]:
        """Different tokens for each place behind the one drawn from `row`, likeliest first.

        Args:
          row: what `extend` put out there; its keys and values are the last ones of the `cache`.
        """

    def width(self, config: ModelConfig) -> int:
        """W: of the rows that `walk` puts out, the last layer's output first."""
        return config.hidden_size

    def cached(self, config: ModelConfig) -> ModelConfig:
        """The config whose layers leave keys and values; the model's own, mostly."""
        return config

    def read(
        self,
        params: Parameters,
        tokens: Int[Array, "B P"],
        lengths: Int[Array, " B"],
        requests: Requests,
        capacity: int,
    ) -> tuple[Float[Array, "B W"], KVCache]:
        """The prompts as `walk` has them pass the layers."""
        width, walk = self.width(params.config), self.walk(None)
        params = params.replace(config=self.cached(params.config))
        return read_prompt(params, tokens, lengths, capacity, walk, width=width)

    def kept(
        self,
        params: Parameters,
        last: Float[Array, "B W"],
        cache: KVCache,
        requests: Requests,
    ) -> Guessed:
        """What follows the first token, guessed from the prompt's last row."""
        known = super().kept(params, last, cache, requests)
        guesses = self._guessed(params, last, cache)
        return Guessed(known.row, known.yields, known.rates, guesses=guesses)

    def proposed(
        self, params: Parameters, state: DecodeState, tree: TokenTree
    ) -> tuple[AnyTree, Int[Array, "B drafts"]]:
        """The guesses of the step before, on the tree."""
        known: Guessed = state.extra
        return tree, known.guesses[:, tree.depth[1:] - 1, tree.rank[1:]]

    def drafted(
        self, params: Parameters, state: DecodeState, asked: Bool[Array, ""]
    ) -> DecodeState:
        """Guesses from the row that the newest token was drawn from."""
        known: Guessed = state.extra
        wanted = jnp.bool(self.depth > 0)
        if self.sizes[0] == 1 and len(self.sizes) > 1:
            # Guesses for a step that verifies none would be made for nothing.
            wanted = self.choice(self.hoped(known.yields), state) > 0
            guesses = jax.lax.cond(
                wanted,
                lambda: self._guessed(params, known.row, state.cache),
                lambda: jnp.full(known.guesses.shape, -1, jnp.int32),
            )
        else:
            guesses = self._guessed(params, known.row, state.cache)
        partial = jnp.broadcast_to(wanted.astype(jnp.int32), state.pending.shape)
        return state.replace(extra=known.replace(guesses=guesses), partial=partial)

    def _guessed(
        self, params: Parameters, row: Float[Array, "B W"], cache: KVCache
    ) -> Int[Array, "B depth ranks"]:
        if self.depth == 0:
            return jnp.zeros((row.shape[0], 0, 1), jnp.int32)
        return self.guesses(params, row, min(self.ranks, params.config.vocab_size), cache)


def choose_trees(text: str, depth: int, accuracies: np.ndarray | None) -> Trees:
    """What the option `tree` says.

    Args:
      text: `chain`: every head's best guess; `none`: no drafts; `3x2x1`: children of each node by
        depth; `measured`: the trees that emit most tokens by `accuracies`, of which steps take the
        one that pays; `auto`: the same, or a chain of the length that pays where nothing was
        measured.
      depth: places that the heads can guess.
      accuracies: as in `TokenTree.expected_tokens`; may be deeper than the heads.

    Raises:
      InputError: another text, a tree deeper than the heads, or nothing to measure it by.
    """
    if text in ("auto", "measured"):
        if accuracies is not None:
            shares = accuracies[:depth]
            # A later guess that seems better than the one before it is noise (`build_tree`).
            shares = np.minimum.accumulate(shares, axis=1)
            built = {build_tree(shares, size) for size in backend.step_sizes()}
            trees = tuple(sorted(built, key=lambda tree: tree.size))
            expected = [tree.expected_tokens(shares) - 1 for tree in trees]
        elif text == "measured":
            raise InputError(
                "tree=measured needs accuracies, and these heads carry none: `mtd train` measures "
                "them where data.held_out_fraction or data.held_out puts texts aside"
            )
        else:
            trees = tuple(TokenTree.chain(drafts) for drafts in range(depth + 1))
            hopes = np.cumprod([*_PUBLISHED, *[_PUBLISHED[-1]] * depth])
            expected = [float(hopes[: tree.size - 1].sum()) for tree in trees]
        costs = [backend.relative_step_cost(tree.size) for tree in trees]
        return Trees(trees, np.array(expected, np.float32), np.array(costs, np.float32), auto=True)
    chains = {"chain": depth, "none": 0}
    tree = TokenTree.chain(chains[text]) if text in chains else _branching(text)
    if tree.max_depth > depth:
        raise InputError(f"tree={text} is {tree.max_depth} deep; the heads guess {depth} places")
    ones = np.ones(1, np.float32)
    return Trees((tree,), ones * max(tree.max_depth, 1), ones, auto=False)


def _branching(text: str) -> TokenTree:
    widths = text.split("x")
    if not all(width.isdecimal() and len(width) < 5 for width in widths):
        raise InputError(
            f"tree must be auto, measured, chain, none or widths like 3x2x1, got '{text[:40]}'"
        )
    return TokenTree.branching(*map(int, widths))
