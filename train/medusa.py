"""Training of Medusa heads from start to finish on one page.

    python -m train.medusa --model models/smollm2-135m-instruct --data answers.jsonl --out heads

The base stays as it is: it makes the rows that the heads read, and nothing of it is stored for a
backward pass. `mtd train configs/medusa/smollm2-135m.toml` runs the very same step; around it, it
adds what a long run needs (mtd_jax/training/loop.py), and measures how often the heads are right.
"""

from __future__ import annotations

import sys
from itertools import islice
from pathlib import Path

import jax

import mtd_jax as mtd
from mtd_jax.cli.arguments import Parser
from mtd_jax.convert.atomic import check_free
from mtd_jax.convert.heads import save_heads
from mtd_jax.convert.load import load_as_stored
from mtd_jax.training.batches import batches
from mtd_jax.training.config import parse_config
from mtd_jax.training.data import prepare
from mtd_jax.training.devices import batch_sharding, share_of_rows, training_mesh
from mtd_jax.training.heads import HeadsTraining
from mtd_jax.training.step import Trainer


def main() -> None:
    """Trains for a number of steps and writes the heads."""
    parser = Parser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--model", required=True, metavar="PATH")
    parser.add_argument("--data", required=True, metavar="FILE.jsonl")
    parser.add_argument("--out", required=True, type=Path, metavar="DIR")
    parser.add_argument("--heads", type=int, default=3, metavar="K", help="places to guess")
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--length", type=int, default=256, help="tokens of a row")
    parser.add_argument("--batch-size", type=int, default=4, help="rows of a step")
    args = parser.parse_args()
    config = parse_config(
        {
            "model": args.model,
            "out": str(args.out),
            "method": "medusa",
            "options": {"count": args.heads},
            "data": {"train": [args.data], "length": args.length, "batch_size": args.batch_size},
            "optimizer": {"steps": args.steps, "learning_rate": 1e-3},
        }
    )
    check_free(args.out)

    mesh = training_mesh(config.mesh)
    share_of_rows(mesh, args.batch_size, accumulate=1)
    model = load_as_stored(args.model, mesh=mesh)
    cache = args.out.with_name(f"{args.out.name}.tokens")
    rows = prepare(config.data, model.tokenizer, model.config, seed=0, cache=cache).train

    # The heads are what is differentiated; the model is an argument like the batch.
    trainer = Trainer.of(config)
    objective = trainer.objective
    assert isinstance(objective, HeadsTraining)
    heads, base = objective.split(model.params)
    base = jax.tree.map(lambda w: w.astype(trainer.compute), base)
    with jax.set_mesh(mesh):
        state = trainer.start(heads, seed=0)
        step = jax.jit(trainer.step, donate_argnums=0)
        for local in islice(batches(rows, batch_size=args.batch_size, seed=0), args.steps):
            batch = jax.device_put(local, batch_sharding(mesh))
            state, measured = step(state, base, batch)
            right = "  ".join(
                f"{float(measured[f'accuracy_{i + 1}']):.3f}" for i in range(args.heads)
            )
            loss = float(measured["loss"])
            print(f"step {int(state.step)}  loss {loss:.4f}  right {right}", flush=True)

    done = objective.heads(state.trainable, model.fingerprint, {"steps": args.steps})
    save_heads(done, args.out, dtype="bfloat16")
    print(f"decode with --method medusa --heads {args.out}")


if __name__ == "__main__":
    try:
        main()
    except (mtd.InputError, OSError) as error:
        print(f"medusa.py: error: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(2)
