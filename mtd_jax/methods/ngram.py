"""Adaptive n-grams: each draft is the token that followed most often where the text was alike.

ANPD (arXiv 2404.08698): an n-gram table over prompt and answer, of all orders up to `longest`, read
greedily and backing off from the highest order that knows anything. The table is the text itself:
one pass over it finds all places that end as the draft does, which costs microseconds, needs no
memory and knows every token the moment it is there.
"""

from __future__ import annotations

from typing import ClassVar

import jax
import jax.numpy as jnp

from mtd_jax.decoding.matching import agreement, extended_matches, followers, suffix_matches
from mtd_jax.decoding.method import DecodeState
from mtd_jax.methods.copying import Copying
from mtd_jax.typing import Array, Int

LONGEST = 6
"""The highest order, where nothing else is said: tokens of context that are told apart."""
_BUCKETS = 4096
"""Followers are counted by token modulo this: a vocabulary's worth of zeros a draft would cost more
than the few wrong counts do."""


class NGram(Copying):
    """See the module's docstring; made by `methods.ngram`."""

    name: ClassVar[str] = "ngram"

    def propose(self, state: DecodeState) -> tuple[Int[Array, "B drafts"], Int[Array, "B depth"]]:
        """The likeliest followers, by rank, at every node; the kinds are those of the best path."""
        text, length = state.history.text, state.history.length
        if self.tree.size == 1:
            none = jnp.zeros((text.shape[0], 0), jnp.int32)
            return none, none
        at_node = {0: suffix_matches(text, length, self.longest)}
        best_path = {0}
        kinds = []
        drafts: dict[int, jax.Array] = {}
        for node in range(self.tree.size):
            children = self.tree.children(node)
            if not children:
                continue
            tokens = _likeliest(at_node[node], text, len(children))
            if node in best_path:
                best_path.add(children[0])
                kinds.append(agreement(at_node[node], text, tokens[0]))
            for child, token in zip(children, tokens, strict=True):
                drafts[child] = token
                if self.tree.children(child):
                    known = extended_matches(at_node[node], text, length, token, self.longest)
                    # A chain ends where nothing is known.
                    at_node[child] = jnp.where((token >= 0)[:, None], known, 0)
        in_order = [drafts[n] for n in range(1, self.tree.size)]
        return jnp.stack(in_order, axis=1), jnp.stack(kinds, axis=1)


def _likeliest(
    matched: Int[Array, "B C"], text: Int[Array, "B C"], count: int
) -> list[Int[Array, " B"]]:
    """The tokens that most often follow the longest matches; of equals the latest; -1: none."""
    follower = followers(text)
    best = jnp.max(matched, axis=1, keepdims=True)
    candidate = (matched == best) & (best > 0)
    rows = jnp.arange(text.shape[0], dtype=jnp.int32)[:, None]
    bucket = follower % _BUCKETS
    counts = jnp.zeros((text.shape[0], _BUCKETS), jnp.float32)
    counts = counts.at[rows, bucket].add(candidate.astype(jnp.float32))
    score = counts[rows, bucket]
    index = jnp.arange(text.shape[1], dtype=jnp.int32)[None, :]
    found = []
    for _ in range(count):
        highest = jnp.max(jnp.where(candidate, score, -1.0), axis=1, keepdims=True)
        at = jnp.argmax(jnp.where(candidate & (score == highest), index, -1), axis=1)
        token = jnp.take_along_axis(follower, at[:, None], axis=1)
        token = jnp.where(jnp.any(candidate, axis=1, keepdims=True), token, -1)
        found.append(token[:, 0])
        candidate = candidate & (follower != token)
    return found
