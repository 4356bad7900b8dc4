"""Measured costs and the tree that they make best."""

from __future__ import annotations

import numpy as np
import pytest

from mtd_jax import calibrated, methods
from mtd_jax.decoding.tree import TokenTree, best_tree, build_tree
from mtd_jax.errors import InputError
from mtd_jax.evaluation.step_cost import measure, step_seconds
from tests.support import tiny


def test_the_tree_is_chosen_by_costs_of_this_machine() -> None:
    """As a method with trained heads will do it; what is measured is not judged."""
    seconds = step_seconds(tiny.language_model(), rows=(1, 4, 8))
    costs = [seconds(rows) for rows in (1, 2, 4, 8, 16)]
    assert min(costs) > 0
    assert costs[1] == pytest.approx(costs[0] + (costs[2] - costs[0]) / 3)
    accuracies = np.array([[0.6, 0.2], [0.4, 0.2]])

    def speed(tree: TokenTree) -> float:
        return tree.expected_tokens(accuracies) / seconds(tree.size)

    chosen = best_tree(accuracies, seconds, max_nodes=6)
    assert all(speed(chosen) >= speed(build_tree(accuracies, n)) for n in range(1, 7))


def test_a_method_without_a_choice_is_left_alone() -> None:
    model = tiny.language_model()
    for method in (methods.autoregressive(), methods.ngram(drafts=3)):
        assert calibrated(model, method) is method
    with pytest.raises(InputError, match="batch_size"):
        calibrated(model, methods.ngram(), batch_size=0)


def test_every_size_is_measured() -> None:
    model, method = tiny.language_model(), methods.ngram()
    assert len(measure(model, method)) == len(method.sizes)
    fitted = calibrated(model, method, batch_size=2)
    assert fitted.sizes == method.sizes
    assert np.all(np.asarray(fitted.costs) > 0)
