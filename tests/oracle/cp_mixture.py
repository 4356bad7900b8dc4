"""The mixture as a book would write it: numpy, float64, plain probabilities, every outcome."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import numpy as np


def table(w: np.ndarray, p: np.ndarray) -> np.ndarray:
    """[V, V, ...] probability of every outcome, of weights [r] and tables [r, n, V]."""
    experts, steps, vocab = p.shape
    out = np.zeros((vocab,) * steps)
    for tokens in itertools.product(range(vocab), repeat=steps):
        for a in range(experts):
            out[tokens] += w[a] * np.prod([p[a, s, token] for s, token in enumerate(tokens)])
    return out


def conditional(w: np.ndarray, p: np.ndarray, before: Sequence[int]) -> np.ndarray:
    """[V] what follows `before`, read off the table of all outcomes."""
    joint = table(w, p)[tuple(before)]
    while joint.ndim > 1:
        joint = joint.sum(axis=-1)
    return joint / joint.sum()


def posterior(w: np.ndarray, p: np.ndarray, before: Sequence[int | None]) -> np.ndarray:
    """[r] which expert it was, by Bayes' rule; nobody saw the steps at None."""
    seen = [(s, x) for s, x in enumerate(before) if x is not None]
    weight = w * [np.prod([p[a, s, x] for s, x in seen]) for a in range(len(w))]
    return weight / weight.sum()
