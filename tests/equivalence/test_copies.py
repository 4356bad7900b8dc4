"""Copies beside heads: every row drafts what brings more, and the tokens stay the same."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

from mtd_jax import generate, methods
from mtd_jax.decoding.adaptive import AcceptanceRates
from mtd_jax.decoding.tree import TokenTree
from mtd_jax.errors import InputError
from mtd_jax.methods.copies import Copies
from tests.support import heads, tiny

HEADS = ["cp", "hidden_transfer", "hydra", "independent_heads", "medusa"]
BUDGET = 60
# The answers of this model to these run in circles.
PROMPTS = [[7] * 12, [50, 40, 50, 40, 50]]


def test_a_chain_of_copies_stands_in_place_of_a_tree() -> None:
    """Two rows, the second of which copies."""
    #   0 - 1 - 3       0 - 1 - 2 - 3 - 4
    #     - 2 - 4
    tree = TokenTree.branching(2, 1)
    guessed = jnp.asarray([[11, 12, 13, 14]] * 2, jnp.int32)
    copied = jnp.asarray([[21, 22, 23, 24, 25, 26]] * 2, jnp.int32)
    copies = Copies(copied, jnp.zeros_like(copied), jnp.zeros((1, 2), jnp.float32))
    copying = jnp.asarray([False, True])
    trees, drafts = copies.in_place_of(tree, guessed, copying)
    np.testing.assert_array_equal(trees.parents, [[0, *tree.parents], [0, 0, 1, 2, 3]])
    np.testing.assert_array_equal(trees.depth, [tree.depth, [0, 1, 2, 3, 4]])
    np.testing.assert_array_equal(drafts, [[11, 12, 13, 14], [21, 22, 23, 24]])


def test_rates_learn_of_copies_alone() -> None:
    rates = AcceptanceRates.empty(2, (0.0, 0.5), 1.0)
    kinds = jnp.ones((2, 3), jnp.int32)
    copies = Copies(kinds, kinds, jnp.zeros((1, 2), jnp.float32))
    drafted, accepted = (jnp.asarray([n, n], jnp.int32) for n in (3, 2))
    found = copies.after(rates, drafted, accepted, jnp.asarray([True, False]))
    np.testing.assert_allclose(found.tried[:, 1], [3, 0])
    np.testing.assert_allclose(found.accepted[:, 1], [2, 0])


@pytest.mark.parametrize("name", HEADS)
def test_texts_that_repeat_themselves_are_copied(name: str) -> None:
    """Heads that are never right, and copies that are: most tokens come from the latter."""
    model = tiny.language_model(tiny.config(eos_token_ids=()))
    useless = heads.random(model, name, seed=5)
    plain = generate(model, methods.autoregressive(), PROMPTS, max_new_tokens=BUDGET)
    passes = []
    for copy in (False, True):
        method: Any = methods.make_method(name, {"tree": "2x2x1", "copy": copy}, useless)
        done = generate(model, method, PROMPTS, max_new_tokens=BUDGET, batch_size=2)
        assert [c.token_ids for c in done] == [c.token_ids for c in plain]
        passes.append(sum(c.metrics.forwards for c in done))
    assert passes[1] < 0.8 * passes[0]


def test_copies_are_not_drawn() -> None:
    model = tiny.language_model()
    with pytest.raises(InputError, match="copy does not go with acceptance=rejection"):
        methods.make_method(
            "cp", {"acceptance": "rejection", "copy": "true"}, heads.random(model, "cp")
        )


def test_without_drafts_nothing_is_copied() -> None:
    model = tiny.language_model()
    method: Any = methods.make_method(
        "medusa", {"tree": "none", "copy": True}, heads.random(model, "medusa")
    )
    assert method.copier is None
    (done,) = generate(model, method, [[7] * 12], max_new_tokens=8)
    assert done.metrics.drafted == 0
