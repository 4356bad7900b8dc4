r"""How alike pseudo rows and real rows are, layer by layer, on held-out answers.

    python benchmarks/transfer_rows.py configs/hidden_transfer/smollm2-135m.toml \
        --heads mtd_jax/heads/smollm2-135m-hidden-transfer --set data.train='["answers.jsonl"]' \
        --out benchmarks/results/cpu-transfer-rows.json --plot docs/transfer-rows-cpu.png

The figure of Hidden Transfer's paper (arXiv 2404.12022): pseudo row i of position n beside what the
same layers make of the token that really stands at n + i.
"""

from __future__ import annotations

import itertools
import json
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mtd_jax import methods
from mtd_jax.cli.page import make_parser, run
from mtd_jax.cli.train import prepare_run
from mtd_jax.convert.heads import load_heads
from mtd_jax.evaluation import environment, plot
from mtd_jax.methods.transfer import (
    HiddenTransferSpec,
    TransferWeights,
    Way,
    rows_by_stage,
)
from mtd_jax.training.config import read_config
from mtd_jax.training.loop import held_out_parts
from mtd_jax.transformer.model import Parameters
from mtd_jax.transformer.packed import Packed, shifted
from mtd_jax.typing import Array, Float


@partial(jax.jit, static_argnames="way")
def similarities(
    way: Way, weights: TransferWeights, base: Parameters, batch: Packed
) -> tuple[Float[Array, "layers k"], Float[Array, " k"]]:
    """Sums of cosines, by layers passed since the first map, and how many each map has.

    A map that has not been applied yet has 0.
    """
    count, first = len(way.layers), way.marks[0]
    batch = batch.replace(learn=batch.answer)  # a chat's template is never decoded
    counted = jnp.stack([batch.targets(i + 2)[1] for i in range(count)], axis=-1)
    stages = itertools.pairwise(range(first, base.config.num_layers + 1))
    found = []
    for layer, x, pseudo in rows_by_stage(way, weights, base, batch, stages):
        inside = np.array([i for i in range(count) if way.layers[i] <= layer])
        real = jnp.stack([shifted(x, i + 1) for i in inside], axis=2)
        alike = jnp.where(counted[..., inside], _cosine(pseudo, real), 0.0)
        found.append(jnp.zeros(count, jnp.float32).at[inside].set(alike.sum((0, 1))))
    return jnp.stack(found), counted.sum((0, 1), dtype=jnp.float32)


def _cosine(a: Any, b: Any) -> Any:
    a, b = a.astype(jnp.float32), b.astype(jnp.float32)
    lengths = jnp.linalg.norm(a, axis=-1) * jnp.linalg.norm(b, axis=-1)
    return (a * b).sum(axis=-1) / jnp.maximum(lengths, 1e-9)


def main() -> None:
    """Measures, writes and draws."""
    parser = make_parser(__doc__)
    parser.add_argument("config", help="that the heads were trained with: its held-out texts")
    parser.add_argument("--heads", required=True)
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--plot", type=Path)
    args = parser.parse_args()
    prepared = prepare_run(read_config(args.config, args.set))
    base = prepared.load()
    heads = load_heads(args.heads, base)
    way = methods.spec_of(heads, HiddenTransferSpec).way(base.config)
    with jax.set_mesh(prepared.mesh):
        parts = [
            jax.device_get(similarities(way, heads.weights, base.params, batch))
            for batch in held_out_parts(prepared)
        ]
    sums, counts = (np.sum(part, axis=0, dtype=np.float64) for part in zip(*parts, strict=True))
    cosines = np.asarray(sums / counts)
    by_layer = [
        {
            "layer": way.marks[0] + place,
            "cosine": [
                round(float(value), 4) if way.layers[i] <= way.marks[0] + place else None
                for i, value in enumerate(row)
            ],
        }
        for place, row in enumerate(cosines)
    ]
    result = {
        "hardware": environment.hardware(),
        "versions": environment.versions(),
        **environment.provenance(),
        "layers": list(way.layers),
        "positions": np.asarray(counts).astype(int).tolist(),
        "by_layer": by_layer,
    }
    args.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    if args.plot is not None:
        plot.plot_similarity(by_layer, args.plot)


if __name__ == "__main__":
    run(main, "transfer_rows.py")
