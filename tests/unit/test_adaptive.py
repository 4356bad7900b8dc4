"""How many rows a step takes: the slow sum, limits, ties, and what experience changes."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mtd_jax.decoding.adaptive import (
    AcceptanceRates,
    Yields,
    best_size,
    best_tree_index,
    urgency,
)
from mtd_jax.decoding.tree import TokenTree
from mtd_jax.methods.drafting import choose_trees

SIZES = (1, 4, 8, 16)
COSTS = (1.0, 1.3, 1.5, 1.9)


def _chances(rate: list[float]) -> jax.Array:
    """The same chance for every draft of a row."""
    return jnp.tile(jnp.asarray(rate, jnp.float32)[:, None], (1, SIZES[-1] - 1))


def _chosen(
    rate: list[float],
    available: list[int],
    active: list[bool] | None = None,
    costs: tuple[float, ...] = COSTS,
) -> int:
    index = best_size(
        SIZES,
        jnp.asarray(costs, jnp.float32),
        _chances(rate),
        jnp.asarray(available, jnp.int32),
        jnp.asarray(active or [True] * len(rate), jnp.float32),
    )
    return SIZES[int(index)]


def _slow(rate: list[float], available: list[int], active: list[bool]) -> int:
    best, chosen = -1.0, 0
    for size, measured in zip(SIZES, COSTS, strict=True):
        cost = 1.0 + 1.25 * (measured - 1.0)
        tokens = 0.0
        for r, a, on in zip(rate, available, active, strict=True):
            tokens += on * sum(r**i for i in range(min(size - 1, a) + 1))
        if tokens / cost > best + 1e-9:
            best, chosen = tokens / cost, size
    return chosen


def test_the_fastest_size_is_chosen() -> None:
    rng = np.random.default_rng(0)
    seen = set()
    for _ in range(200):
        rows = int(rng.integers(1, 5))
        rate = rng.choice([0.0, 0.1, 0.5, 0.7, 0.9, 0.99], rows).tolist()
        available = rng.integers(0, 16, rows).tolist()
        active = (rng.random(rows) < 0.7).tolist()
        if any(active):
            seen.add(_chosen(rate, available, active))
            assert _chosen(rate, available, active) == _slow(rate, available, active)
    assert seen == set(SIZES)


@pytest.mark.parametrize("rate", [0.0, 0.5, 1.0])
def test_without_drafts_there_is_one_row(rate: float) -> None:
    assert _chosen([rate], [0]) == 1
    assert _chosen([rate], [0], costs=(1.0, 1.0, 1.0, 1.0)) == 1


def test_every_draft_counts_with_its_own_chance() -> None:
    """Three sure drafts in front of an unlikely one: four rows; an unlikely one first: none."""
    one = jnp.ones(1, jnp.float32)

    def chosen(chances: list[float]) -> int:
        padded = jnp.asarray([chances + [0.9] * (SIZES[-1] - 1 - len(chances))], jnp.float32)
        costs = jnp.asarray(COSTS, jnp.float32)
        return SIZES[int(best_size(SIZES, costs, padded, jnp.asarray([15], jnp.int32), one))]

    assert chosen([0.9, 0.9, 0.9, 0.05]) == 4
    assert chosen([0.05]) == 1
    assert chosen([]) == 16


def test_dear_rows_are_not_bought() -> None:
    assert _chosen([0.9], [15]) == 16
    assert _chosen([0.9], [15], costs=(1.0, 9.0, 9.0, 9.0)) == 1


def test_rows_that_are_ahead_count_less() -> None:
    """Drafts for the first row alone pay, until the second one is far behind."""

    def chosen(wanted: list[int], active: list[bool]) -> int:
        weight = urgency(jnp.asarray(active), jnp.asarray(wanted, jnp.int32))
        assert float(weight.max()) == 1.0
        index = best_size(
            SIZES,
            jnp.asarray(COSTS, jnp.float32),
            _chances([0.9, 0.9]),
            jnp.asarray([15, 0], jnp.int32),
            weight,
        )
        return SIZES[int(index)]

    assert chosen([100, 100], [True, True]) > 1
    assert chosen([20, 100], [True, True]) == 1
    assert chosen([20, 100], [True, False]) > 1
    assert chosen([100, 20], [True, True]) > 1


def _rate(rates: AcceptanceRates, kind: int) -> float:
    return float(rates.of(jnp.array([[kind]], jnp.int32))[0, 0])


def test_every_draft_that_was_looked_at_is_news_of_its_kind() -> None:
    rates = AcceptanceRates.empty(1, (0.0, 0.5, 0.5, 0.5, 0.5), 1.0)
    kinds = jnp.array([[1, 2, 3, 4]], jnp.int32)
    drafted, accepted = jnp.array([4], jnp.int32), jnp.array([2], jnp.int32)
    rates = rates.after(kinds, drafted, accepted)
    np.testing.assert_allclose(rates.accepted[0], [0, 1, 1, 0, 0])
    np.testing.assert_allclose(rates.tried[0], [0, 1, 1, 1, 0])  # the fourth was not reached
    assert _rate(rates, 1) == 0.75
    assert _rate(rates, 3) == 0.25
    assert _rate(rates, 4) == 0.5
    # All that were verified were right: nothing is known of those that were not.
    rates = AcceptanceRates.empty(1, (0.0, 0.5, 0.5, 0.5, 0.5), 1.0)
    rates = rates.after(kinds, accepted, accepted)
    np.testing.assert_allclose(rates.tried[0], [0, 1, 1, 0, 0])


def test_rates_follow_what_happens_and_forget_it() -> None:
    def after(rates: AcceptanceRates, kind: int, drafted: int, accepted: int) -> AcceptanceRates:
        counts = [jnp.array([x], jnp.int32) for x in (drafted, accepted)]
        return rates.after(jnp.full((1, 3), kind, jnp.int32), *counts)

    rates = AcceptanceRates.empty(1, (0.5, 0.7, 0.7), 1.0)
    prior = _rate(rates, 1)
    assert _rate(rates, 0) == 0.5
    for _ in range(5):
        rates = after(rates, 1, 3, 0)
    low = _rate(rates, 1)
    assert low < 0.2 < prior == _rate(rates, 2)
    for _ in range(80):
        rates = after(rates, 0, 0, 0)  # steps without drafts
    assert low < 0.5 < _rate(rates, 1) <= prior
    for _ in range(10):
        rates = after(rates, 1, 3, 3)
    assert _rate(rates, 1) > 0.95


def test_the_tree_that_pays() -> None:
    expected = jnp.asarray([0.0, 1.0, 1.5], jnp.float32)
    costs = jnp.asarray([1.0, 1.5, 3.0], jnp.float32)
    two = jnp.asarray([1.0, 1.0], jnp.float32)

    def chosen(ratio: list[float], weight: jax.Array = two, left: int = 100) -> int:
        wanted = jnp.asarray([left, left], jnp.int32)
        hoped = expected[:, None] * jnp.asarray(ratio, jnp.float32)[None, :]
        return int(best_tree_index(hoped, costs, weight, wanted))

    # Costs over one row count a fourth more.
    assert chosen([1.0, 1.0]) == 1  # 2 / 1.625 a second, against 1 and 2.5 / 3.5
    assert chosen([0.2, 0.2]) == 0
    assert chosen([0.5, 1.0]) == 1  # 3.5 tokens of both rows in 1.625, against 2 in 1
    assert chosen([0.5, 1.0], jnp.asarray([1.0, 0.0], jnp.float32)) == 0
    assert chosen([1.0, 1.0], left=1) == 0  # what a draft would bring is not wanted any more


def test_yields_follow_the_text_and_forget() -> None:
    yields = Yields.empty(2)
    np.testing.assert_array_equal(yields.ratio(), [1.0, 1.0])
    for _ in range(40):
        yields = yields.after(jnp.asarray([0, 3]), jnp.asarray([1.5, 1.5], jnp.float32))
    low, high = yields.ratio().tolist()
    assert low < 0.15
    assert 1.7 < high < 2.0
    for _ in range(200):  # steps without drafts
        yields = yields.after(jnp.asarray([0, 0]), jnp.zeros(2, jnp.float32))
    np.testing.assert_allclose(yields.ratio(), [1.0, 1.0], atol=0.01)


def test_trees_of_an_option() -> None:
    measured = np.array([[0.6, 0.2, 0.1], [0.4, 0.1, 0.05]])
    found = choose_trees("auto", 2, measured)
    assert found.auto
    assert found.trees[0].size == 1
    assert [t.size for t in found.trees] == sorted({t.size for t in found.trees})
    assert found.expected[0] == 0
    np.testing.assert_allclose(
        found.expected[1:], [t.expected_tokens(measured) - 1 for t in found.trees[1:]], rtol=1e-6
    )
    assert all(tree.is_chain for tree in choose_trees("auto", 3, None).trees)
    assert choose_trees("chain", 2, measured).trees == (TokenTree.chain(2),)
    assert choose_trees("3x1", 2, None).trees == (TokenTree.branching(3, 1),)
    # Heads that were never right: nothing is drafted.
    assert [t.size for t in choose_trees("measured", 2, np.zeros((2, 3))).trees] == [1]
