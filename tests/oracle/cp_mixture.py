"""The mixture as a book would write it: numpy, float64, plain probabilities, every outcome."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np

from mtd_jax.transformer.model import Parameters
from tests.oracle import transformer


def tables(
    weights: Any, params: Parameters, text: list[int], ids: Sequence[int] = ()
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """[T, r] weights, [T, r, n, V] tables and [T, V] what the base says; of `ids`, if any."""
    w, p = transformer.in_numpy(weights), transformer.in_numpy(params)
    x = transformer.hidden(p, text)
    e = transformer.normed(p, x)
    if w.output is not None:
        logits = np.einsum("td,rndv->trnv", e, w.output)
    else:
        moved = np.einsum("td,drnk->trnk", e, w.down)
        moved = moved if w.up is None else np.einsum("trnk,rnkd->trnd", moved, w.up)
        logits = (e[:, None, None] + moved) @ (p.embedding.T if p.head is None else p.head)
    logits, plain = transformer.capped(logits, p.config), transformer.output(p, x)
    if ids:
        logits, plain = logits[..., ids], plain[..., ids]
    return softmax(e @ w.gate), softmax(logits), softmax(plain)


def first(weights: Any, params: Parameters, text: list[int]) -> np.ndarray:
    """[V] log-probabilities of the next token by the mixture."""
    w, p, _ = tables(weights, params, text)
    return np.log(w[-1] @ p[-1, :, 0])


def softmax(x: np.ndarray) -> np.ndarray:
    """Over the last axis."""
    x = np.exp(x - x.max(-1, keepdims=True))
    return x / x.sum(-1, keepdims=True)


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
