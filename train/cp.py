"""Training of CP heads from start to finish on one page, with or without the model below them.

    python -m train.cp --model models/smollm2-135m-instruct --data answers.jsonl --out heads
    python -m train.cp --model models/byte-6m --data texts.jsonl --out runs/whole --trunk

The first learns from what the base says (distillation), the second from the text, all weights at
once. `mtd train` with configs/cp/ runs the very same step; around it, it adds what a long run needs
(mtd_jax/training/loop.py), and measures how often drafts are right.
"""

from __future__ import annotations

import dataclasses
import sys
from itertools import islice
from pathlib import Path

import jax

import mtd_jax as mtd
from mtd_jax.cli.arguments import Parser
from mtd_jax.convert.atomic import check_free
from mtd_jax.convert.conversions import save_native
from mtd_jax.convert.fingerprint import fingerprint
from mtd_jax.convert.heads import save_heads
from mtd_jax.convert.load import load_as_stored
from mtd_jax.training.batches import batches
from mtd_jax.training.config import parse_config
from mtd_jax.training.data import prepare
from mtd_jax.training.devices import batch_sharding, share_of_rows, training_mesh
from mtd_jax.training.heads import HeadsTraining
from mtd_jax.training.step import Trainer


def main() -> None:
    """Trains for a number of steps and writes what was trained."""
    parser = Parser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--model", required=True, metavar="PATH")
    parser.add_argument("--data", required=True, metavar="FILE.jsonl")
    parser.add_argument("--out", required=True, type=Path, metavar="DIR")
    parser.add_argument("--tokens", type=int, default=4, metavar="N", help="of the mixture")
    parser.add_argument("--rank", type=int, default=4, metavar="R", help="experts")
    parser.add_argument("--trunk", action="store_true", help="train the model too")
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--length", type=int, default=256, help="tokens of a row")
    parser.add_argument("--batch-size", type=int, default=4, help="rows of a step")
    args = parser.parse_args()
    options = {"tokens": args.tokens, "rank": args.rank, "balance": 0.01}
    if args.trunk:
        options |= {"trunk": "trained", "loss": "joint"}
    config = parse_config(
        {
            "model": args.model,
            "out": str(args.out),
            "method": "cp",
            "options": options,
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

    # Trainable are the heads, or a pair of the model and the heads; what stays is an argument.
    trainer = Trainer.of(config)
    objective = trainer.objective
    assert isinstance(objective, HeadsTraining)
    trainable, frozen = objective.split(model.params)
    frozen = jax.tree.map(lambda w: w.astype(trainer.compute), frozen)
    with jax.set_mesh(mesh):
        state = trainer.start(trainable, seed=0)
        step = jax.jit(trainer.step, donate_argnums=0)
        for local in islice(batches(rows, batch_size=args.batch_size, seed=0), args.steps):
            batch = jax.device_put(local, batch_sharding(mesh))
            state, measured = step(state, frozen, batch)
            # Of a text's next tokens, each given those before it: what drafts are tested by.
            steps = "  ".join(
                f"{float(measured[f'conditional_{s + 1}']):.3f}" for s in range(args.tokens)
            )
            loss, usage = float(measured["loss"]), float(measured["usage_entropy"])
            print(
                f"step {int(state.step)}  loss {loss:.4f}  nats {steps}  usage {usage:.3f}",
                flush=True,
            )

    heads, place = state.trainable, args.out
    if args.trunk:
        params, heads = heads
        params = jax.tree.map(lambda w, old: w.astype(old.dtype), params, model.params)
        model = dataclasses.replace(model, params=params, fingerprint=fingerprint(params))
        save_native(model, args.out / "model")
        place = args.out / "heads"
    done = objective.heads(heads, model.fingerprint, {"steps": args.steps})
    save_heads(done, place, dtype="bfloat16")
    print(f"decode with --method cp --heads {place}")


if __name__ == "__main__":
    try:
        main()
    except (mtd.InputError, OSError) as error:
        print(f"cp.py: error: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(2)
