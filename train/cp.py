"""Training of CP heads from start to finish on one page, with or without the model below them.

    python -m train.cp --model models/smollm2-135m-instruct --data answers.jsonl --out heads
    python -m train.cp --model models/byte-6m --data texts.jsonl --out runs/whole --trunk

The first learns from what the base says (distillation), the second from the text, all weights at
once. `mtd train` with configs/cp/ runs the very same step; around it, it adds what a long run needs
(mtd_jax/training/loop.py), and measures how often drafts are right.
"""

from __future__ import annotations

import dataclasses

import jax

from mtd_jax.cli.page import run
from mtd_jax.convert.conversions import save_native
from mtd_jax.convert.fingerprint import fingerprint
from mtd_jax.convert.heads import save_heads
from mtd_jax.training.heads import HeadsTraining
from train.common import make_config, make_parser, trained


def main() -> None:
    """Trains for a number of steps and writes what was trained."""
    parser = make_parser(__doc__)
    parser.add_argument("--tokens", type=int, default=4, metavar="N", help="of the mixture")
    parser.add_argument("--rank", type=int, default=4, metavar="R", help="experts")
    parser.add_argument("--trunk", action="store_true", help="train the model too")
    args = parser.parse_args()
    options = {"tokens": args.tokens, "rank": args.rank, "balance": 0.01}
    if args.trunk:
        options |= {"trunk": "trained", "loss": "joint"}
    config = make_config(args, learning_rate=1e-3, method="cp", options=options)
    # Trainable are the heads, or a pair of the model and the heads.
    for last in trained(config):
        measured = {name: float(value) for name, value in last.measured.items()}
        # Of a text's next tokens, each given those before it: what drafts are tested by.
        nats = "  ".join(f"{measured[f'conditional_{s + 1}']:.3f}" for s in range(args.tokens))
        print(
            f"step {int(last.state.step)}  loss {measured['loss']:.4f}  nats {nats}  "
            f"usage {measured['usage_entropy']:.3f}",
            flush=True,
        )

    model, heads, place = last.model, last.state.trainable, args.out
    if args.trunk:
        params, heads = heads
        params = jax.tree.map(lambda w, old: w.astype(old.dtype), params, model.params)
        model = dataclasses.replace(model, params=params, fingerprint=fingerprint(params))
        save_native(model, args.out / "model")
        place = args.out / "heads"
    assert isinstance(last.objective, HeadsTraining)
    done = last.objective.heads(heads, model.fingerprint, {"steps": args.steps})
    save_heads(done, place, dtype="bfloat16")
    print(f"decode with --method cp --heads {place}")


if __name__ == "__main__":
    run(main, "cp.py")
