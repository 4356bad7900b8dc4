"""Prompt lookup: the drafts are what followed the newest tokens where they occurred first.

Saxena's prompt-lookup decoding (github.com/apoorvumang/prompt-lookup-decoding): no training, no
second model. It pays where answers repeat their prompt: summaries, code edits, retrieval.
"""

from __future__ import annotations

from typing import ClassVar

import jax.numpy as jnp

from mtd_jax.decoding.matching import KINDS, agreement, followers, suffix_matches
from mtd_jax.decoding.method import DecodeState
from mtd_jax.methods.copying import Copying
from mtd_jax.typing import Array, Int


class PromptLookup(Copying):
    """See the module's docstring; made by `methods.prompt_lookup`."""

    name: ClassVar[str] = "prompt_lookup"

    def propose(self, state: DecodeState) -> tuple[Int[Array, "B drafts"], Int[Array, "B drafts"]]:
        """The continuation of the first of the longest earlier matches."""
        history = state.history
        matched = suffix_matches(history.text, history.length, self.longest)
        order = jnp.max(matched, axis=1)
        at = jnp.argmax(matched, axis=1).astype(jnp.int32)  # the first of equals
        place = jnp.arange(self.tree.size - 1, dtype=jnp.int32)[None, :]
        index = at[:, None] + 1 + place
        tokens = history.text.at[jnp.arange(len(at))[:, None], index].get(mode="clip")
        known = (index < history.length[:, None]) & (order > 0)[:, None]
        # Behind the first draft one place is followed: a match grows with every token copied.
        copied = jnp.minimum(order[:, None] + place, self.longest) * KINDS + 1
        next_token = jnp.take_along_axis(followers(history.text), at[:, None], axis=1)[:, 0]
        first = agreement(matched, history.text, next_token)
        kinds = jnp.where(place == 0, first[:, None], copied)
        return jnp.where(known, tokens, -1), jnp.where(known, kinds, 0)
