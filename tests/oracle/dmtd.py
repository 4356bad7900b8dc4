"""DMTD as the paper says it: whole sequences, three groups, a 0/1 array; numpy, float64, no cache.

late_in[i] = early[i] + head[i] * middle[i]      (a plain row of a prompt: middle[i])
"""

from __future__ import annotations

import numpy as np

from mtd_jax.transformer.model import Parameters
from tests.oracle import transformer

PLAIN = -1


def places(length: int, prompt: int, cycle: int, anchor: str) -> list[int]:
    """Of every position its place in a cycle; a prompt of `prompt` tokens stands in front."""
    if anchor == "sequence":
        return [i % cycle for i in range(length)]
    return [PLAIN if i < prompt else (i - prompt) % cycle for i in range(length)]


def logits(
    params: Parameters, tokens: list[int], place: list[int], early: int, late: int
) -> np.ndarray:
    """[T, V] logits of one text."""
    p = transformer.in_numpy(params)
    first_late = params.config.num_layers - late
    x = np.stack([p.embedding[t] for t in tokens])
    from_early = transformer.layers(p, x, 0, early)
    from_middle = transformer.layers(p, from_early, early, first_late)
    late_in = np.zeros_like(x)
    for i, where in enumerate(place):
        if where == PLAIN:
            late_in[i] = from_middle[i]
        elif where == 0:
            late_in[i] = from_early[i] + from_middle[i]
        else:
            late_in[i] = from_early[i]
    return transformer.output(
        p, transformer.layers(p, late_in, first_late, params.config.num_layers)
    )


def greedy(
    params: Parameters,
    prompt: list[int],
    budget: int,
    *,
    cycle: int,
    early: int,
    late: int,
    anchor: str,
) -> list[int]:
    """The whole text is run again for every token."""
    tokens = list(prompt)
    while len(tokens) - len(prompt) < budget:
        place = places(len(tokens), len(prompt), cycle, anchor)
        tokens.append(int(np.argmax(logits(params, tokens, place, early, late)[-1])))
    return tokens[len(prompt) :]
