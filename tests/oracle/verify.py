"""Which drafts are kept, a node at a time in float64; and exact outcomes by enumeration.

An outcome is what one verification emits: the drafts kept and the token behind them. A table says
for every text so far how the next token is distributed.
"""

from __future__ import annotations

import itertools
import math
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence

import numpy as np

Tokens = tuple[int, ...]
Table = Callable[[Tokens], np.ndarray]
Outcomes = Mapping[tuple[int, Tokens], float]
"""(drafts kept, tokens emitted) -> probability."""


def children(parents: Sequence[int], node: int) -> list[int]:
    return [child for child, parent in enumerate(parents, start=1) if parent == node]


def walk(
    parents: Sequence[int], drafts: Sequence[int], drawn: Sequence[int], node: int = 0
) -> tuple[list[int], list[int]]:
    """The nodes from `node` on to the last one kept, and the tokens emitted."""
    ways = [
        walk(parents, drafts, drawn, child)
        for child in children(parents, node)
        if drafts[child] >= 0 and drafts[child] == drawn[node]
    ]
    path, tokens = max(ways, key=lambda way: len(way[0]), default=([], []))
    return [node, *path], [drawn[node], *tokens]


def typical(
    parents: Sequence[int],
    drafts: Sequence[int],
    drawn: Sequence[int],
    p: np.ndarray,
    epsilon: float,
    delta: float,
) -> tuple[list[int], list[int]]:
    """The same for the longest way of typical drafts, the one to the lowest node of equals.

    Args:
      p: [M, V]: at each node the distribution of what follows it.
    """
    ways = {0: [0]}
    for node, parent in enumerate(parents, start=1):
        entropy = -sum(x * math.log(x) for x in p[parent] if x > 0)
        threshold = min(epsilon, delta * math.exp(-entropy))
        if parent in ways and drafts[node] >= 0 and p[parent][drafts[node]] > threshold:
            ways[node] = [*ways[parent], node]
    path = max(ways.values(), key=len)
    return path, [*(drafts[node] for node in path[1:]), drawn[path[-1]]]


def joint(p: Table, length: int, vocab: int) -> np.ndarray:
    """[V, ...]: how the first `length` tokens are distributed if one is drawn after the other."""
    out = np.ones((vocab,) * length)
    for tokens in itertools.product(range(vocab), repeat=length):
        for i, token in enumerate(tokens):
            out[tokens] *= p(tokens[:i])[token]
    return out


def rejection(p: Table, q: Table, depth: int) -> Outcomes:
    """Outcomes of a chain of `depth` drafts from q (arXiv 2211.17192, algorithm 1)."""
    return siblings(range(depth), p, q)


def siblings(parents: Sequence[int], p: Table, q: Table) -> Outcomes:
    """Outcomes of a tree whose siblings are drawn from q without replacement (arXiv 2305.09781).

    A q that has no token left offers nothing: what is left of p decides.
    """
    outcomes: dict[tuple[int, Tokens], float] = defaultdict(float)

    def arrive(node: int, text: Tokens, chance: float) -> None:
        offer(children(parents, node), text, p(text), q(text), chance)

    def offer(nodes: list[int], text: Tokens, p: np.ndarray, q: np.ndarray, chance: float) -> None:
        if not nodes or q.sum() == 0:
            for token in np.flatnonzero(p):
                outcomes[len(text), (*text, int(token))] += chance * float(p[token])
            return
        for token in np.flatnonzero(q):
            kept = min(1.0, float(p[token] / q[token]))
            offered = chance * float(q[token])
            if kept > 0:
                arrive(nodes[0], (*text, int(token)), offered * kept)
            if kept < 1:
                others = q.copy()
                others[token] = 0.0
                refused = offered * (1.0 - kept)
                offer(nodes[1:], text, normal(np.maximum(p - q, 0.0)), normal(others), refused)

    arrive(0, (), 1.0)
    return outcomes


def normal(values: np.ndarray) -> np.ndarray:
    return values / values.sum() if values.sum() > 0 else values


def continued(outcomes: Outcomes, p: Table, length: int, vocab: int) -> np.ndarray:
    """[V, ...]: the first `length` tokens if decoding goes on one by one where outcomes end."""
    out = np.zeros((vocab,) * length)
    for (_, tokens), chance in outcomes.items():
        for more in itertools.product(range(vocab), repeat=max(length - len(tokens), 0)):
            text, further = (*tokens, *more), chance
            for i in range(len(tokens), len(text)):
                further *= p(text[:i])[text[i]]
            out[text[:length]] += further
    return out
