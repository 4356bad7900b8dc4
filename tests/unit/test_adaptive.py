"""How many rows a step takes: the slow sum, limits, ties, and what experience changes."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import pytest

from mtd_jax.decoding.adaptive import AcceptanceRates, best_size

SIZES = (1, 4, 8, 16)
COSTS = (1.0, 1.3, 1.5, 1.9)


def _chosen(
    rate: list[float],
    available: list[int],
    active: list[bool] | None = None,
    costs: tuple[float, ...] = COSTS,
) -> int:
    index = best_size(
        SIZES,
        jnp.asarray(costs, jnp.float32),
        jnp.asarray(rate, jnp.float32),
        jnp.asarray(available, jnp.int32),
        jnp.asarray(active or [True] * len(rate)),
    )
    return SIZES[int(index)]


def _slow(rate: list[float], available: list[int], active: list[bool]) -> int:
    best, chosen = -1.0, 0
    for size, cost in zip(SIZES, COSTS, strict=True):
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


def test_dear_rows_are_not_bought() -> None:
    assert _chosen([0.9], [15]) == 16
    assert _chosen([0.9], [15], costs=(1.0, 9.0, 9.0, 9.0)) == 1


def test_rates_follow_what_happens_and_forget_it() -> None:
    def rate(rates: AcceptanceRates, kind: int) -> float:
        return float(rates.of(jnp.array([kind], jnp.int32))[0])

    def after(rates: AcceptanceRates, kind: int, drafted: int, accepted: int) -> AcceptanceRates:
        one = [jnp.array([x], jnp.int32) for x in (kind, drafted, accepted)]
        return rates.after(*one)

    rates = AcceptanceRates.empty(1, 3)
    prior = rate(rates, 1)
    for _ in range(5):
        rates = after(rates, 1, 3, 0)
    low = rate(rates, 1)
    assert low < 0.2 < prior == rate(rates, 2)
    for _ in range(80):
        rates = after(rates, 0, 0, 0)  # steps without drafts
    assert low < 0.5 < rate(rates, 1) <= prior
    for _ in range(10):
        rates = after(rates, 1, 3, 3)
    assert rate(rates, 1) > 0.95
