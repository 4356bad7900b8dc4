"""Training of Medusa heads from start to finish on one page; or of Hydra's, which are told more.

    python -m train.medusa --model models/smollm2-135m-instruct --data answers.jsonl --out heads
    python -m train.medusa --method hydra --model ... --data ... --out ...

The base stays as it is: it makes the rows that the heads read, and nothing of it is stored for a
backward pass. `mtd train configs/medusa/smollm2-135m.toml` runs the very same step; around it, it
adds what a long run needs (mtd_jax/training/loop.py), and measures how often the heads are right.
"""

from __future__ import annotations

from mtd_jax.cli.page import run
from mtd_jax.convert.heads import save_heads
from mtd_jax.training.heads import HeadsTraining
from train.common import make_config, make_parser, trained


def main() -> None:
    """Trains for a number of steps and writes the heads."""
    parser = make_parser(__doc__)
    parser.add_argument("--heads", type=int, default=3, metavar="K", help="places to guess")
    parser.add_argument("--method", choices=["medusa", "hydra"], default="medusa")
    args = parser.parse_args()
    options = {"count": args.heads}
    config = make_config(args, learning_rate=1e-3, method=args.method, options=options)
    # The heads are what is differentiated; the model is an argument like the batch.
    for last in trained(config):
        measured = {name: float(value) for name, value in last.measured.items()}
        right = "  ".join(f"{measured[f'accuracy_{i + 1}']:.3f}" for i in range(args.heads))
        step = int(last.state.step)
        print(f"step {step}  loss {measured['loss']:.4f}  right {right}", flush=True)

    assert isinstance(last.objective, HeadsTraining)
    record = {"steps": args.steps}
    done = last.objective.heads(last.state.trainable, last.model.fingerprint, record)
    save_heads(done, args.out, dtype="bfloat16")
    print(f"decode with --method {args.method} --heads {args.out}")


if __name__ == "__main__":
    run(main, "medusa.py")
