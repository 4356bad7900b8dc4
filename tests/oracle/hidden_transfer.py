"""Hidden Transfer as the paper tells it: numpy, float64, one position and one pseudo row at a time.

Nothing is shared with the model's own code but the oracle of a plain layer.
"""

from __future__ import annotations

import numpy as np

from mtd_jax.transformer.model import Parameters
from tests.oracle import transformer as plain


def pseudo_logits(
    params: Parameters, maps: list[np.ndarray], layers: list[int], chained: bool, tokens: list[int]
) -> np.ndarray:
    """[k, V]: what the pseudo rows of the last token say.

    Args:
      maps: [D, D] of each step, the identity included.
      layers: that the text has passed where each map is applied.
    """
    p = plain.in_numpy(params)
    embedded = np.stack([p.embedding[t] for t in tokens])
    hidden = [plain.layers(p, embedded, 0, n) for n in range(params.config.num_layers)]
    rows: dict[int, np.ndarray] = {}
    for layer in range(params.config.num_layers):
        for i, start in enumerate(layers):
            if start == layer:
                rows[i] = hidden[layer][-1] @ maps[i]
        rows = {
            i: _through(p, hidden[layer], rows, i, layer, chained, len(tokens) - 1) for i in rows
        }
    return plain.output(p, np.stack([rows[i] for i in sorted(rows)]))


def _through(
    p: Parameters,
    text: np.ndarray,
    rows: dict[int, np.ndarray],
    i: int,
    layer: int,
    chained: bool,
    last: int,
) -> np.ndarray:
    """Row i behind a layer: it is run in a text of what it sees, each where it stands."""
    seen = {n: text[n] for n in range(last + 1)}
    if chained:
        seen |= {last + 1 + other: rows[other] for other in rows if other < i}
    seen[last + 1 + i] = rows[i]
    places = sorted(seen)
    return plain.layers(p, np.stack([seen[n] for n in places]), layer, layer + 1, places)[-1]
