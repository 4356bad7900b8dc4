"""Penalties, temperature, top-k, top-p and min-p on one row, in the words of their definitions."""

from __future__ import annotations

import numpy as np


def probabilities(
    logits: np.ndarray, temperature: float, top_k: int, top_p: float, min_p: float
) -> np.ndarray:
    if temperature == 0:
        out = np.zeros(len(logits))
        out[np.argmax(logits)] = 1.0
        return out
    p = np.exp((logits - logits.max()) / temperature)
    p /= p.sum()
    if top_k:
        kth = np.sort(p)[::-1][min(top_k, len(p)) - 1]
        p = np.where(p >= kth, p, 0.0)
        p /= p.sum()
    if top_p < 1.0:
        kept, reached = np.zeros(len(p), bool), 0.0
        for i in np.argsort(-p, kind="stable"):
            if reached >= top_p:
                break
            kept[i] = True
            reached += p[i]
        p = np.where(p >= p[kept].min(), p, 0.0)
        p /= p.sum()
    p = np.where(p >= min_p * p.max(), p, 0.0)
    return p / p.sum()


def penalized(
    logits: np.ndarray,
    prompt: list[int],
    answer: list[int],
    repetition: float,
    presence: float,
    frequency: float,
) -> np.ndarray:
    out = np.array(logits, np.float64)
    for token in set(prompt + answer):
        out[token] = out[token] / repetition if out[token] > 0 else out[token] * repetition
    for token in answer:
        out[token] -= frequency
    for token in set(answer):
        out[token] -= presence
    return out
