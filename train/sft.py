"""Fine-tuning from start to finish on one page.

    python -m train.sft --model models/smollm2-135m-instruct --data gsm8k_train.jsonl --out tuned

Rows of packed conversations, a loss that is differentiated by its first argument, AdamW, and a
checkpoint that decodes at once. `mtd train` runs the very same step; around it, it adds what a long
run needs: checkpoints to go on from, evaluation, logs, several hosts (mtd_jax/training/loop.py).
The loop stands in train/common.py.
"""

from __future__ import annotations

import dataclasses

import jax

from mtd_jax.cli.page import run
from mtd_jax.convert.conversions import save_native
from mtd_jax.convert.fingerprint import fingerprint
from train.common import make_config, make_parser, trained


def main() -> None:
    """Trains for a number of steps and writes the model."""
    args = make_parser(__doc__).parse_args()
    # All weights are trained here; a method's heads would be `trainable`, and the model `frozen`.
    for last in trained(make_config(args, learning_rate=2e-5)):
        loss = float(last.measured["loss"])
        print(f"step {int(last.state.step)}  loss {loss:.4f}", flush=True)

    model = last.model
    params, method = last.objective.decoder(last.state.trainable, last.frozen)
    params = jax.tree.map(lambda new, old: new.astype(old.dtype), params, model.params)
    save_native(
        dataclasses.replace(model, params=params, fingerprint=fingerprint(params)), args.out
    )
    print(f"{args.out} decodes with --method {method.name}")


if __name__ == "__main__":
    run(main, "sft.py")
