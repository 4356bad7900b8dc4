"""Fine-tuning for cycles (DMTD) from start to finish on one page.

    python -m train.dmtd --model models/smollm2-135m-instruct --data gsm8k_train.jsonl --out tuned

The whole method is in `loss`: an array says where each token stands in its cycle, and only heads
send what the middle layers made of them on to the late ones. `mtd train` with method = "dmtd" runs
the same forward pass; around it, it adds what a long run needs (mtd_jax/training/loop.py).
"""

from __future__ import annotations

import dataclasses
import functools
from itertools import islice
from typing import Any

import jax
import jax.numpy as jnp
import optax

from mtd_jax.cli.page import run
from mtd_jax.config import CycleConfig
from mtd_jax.convert.conversions import save_native
from mtd_jax.convert.fingerprint import fingerprint
from mtd_jax.convert.load import load_as_stored
from mtd_jax.methods.cycles import cycle_hidden, places_in_cycle
from mtd_jax.training.batches import batches
from mtd_jax.training.data import prepare
from mtd_jax.transformer.losses import cross_entropy
from mtd_jax.transformer.model import Parameters
from mtd_jax.transformer.packed import Packed
from train.common import make_config, make_parser


def loss(params: Parameters, batch: Packed) -> jax.Array:
    """Mean cross-entropy of the next token, heads and late-only rows alike."""
    cycles = params.config.cycles
    assert cycles is not None
    places = places_in_cycle(batch, cycles.cycle, cycles.anchor)
    hidden = cycle_hidden(params, batch, places, early=cycles.early, late=cycles.late)
    targets, wanted = batch.targets()
    sums = cross_entropy(params, hidden, targets, wanted, chunk=256)
    return sums["loss"] / wanted.sum(dtype=jnp.float32)


@functools.partial(jax.jit, static_argnums=0, donate_argnums=(1, 2))
def update(
    optimizer: optax.GradientTransformation, params: Parameters, moments: Any, batch: Packed
) -> tuple[Parameters, Any, jax.Array]:
    """One step of the optimiser."""
    value, gradient = jax.value_and_grad(loss)(params, batch)
    change, moments = optimizer.update(gradient, moments, params)
    return optax.apply_updates(params, change), moments, value


def main() -> None:
    """Trains for a number of steps and writes the model."""
    parser = make_parser(__doc__)
    parser.add_argument("--cycle", type=int, default=2, help="tokens of a cycle")
    parser.add_argument("--late", type=int, default=8, help="layers that run for every token")
    args = parser.parse_args()
    data = make_config(args, learning_rate=1e-4).data

    model = load_as_stored(args.model, dtype="float32")
    cycles = CycleConfig(early=0, late=args.late, cycle=args.cycle, anchor="prompt")
    config = dataclasses.replace(model.config, cycles=cycles)  # and with it every checkpoint
    params = model.params.replace(config=config)
    cache = args.out.with_name(f"{args.out.name}.tokens")
    rows = prepare(data, model.tokenizer, config, seed=0, cache=cache).train

    optimizer = optax.chain(
        optax.clip_by_global_norm(1.0),
        optax.adamw(optax.cosine_decay_schedule(1e-4, args.steps), b1=0.9, b2=0.95),
    )
    moments = optimizer.init(params)
    for number, batch in enumerate(
        islice(batches(rows, batch_size=args.batch_size, seed=0), args.steps)
    ):
        params, moments, value = update(optimizer, params, moments, batch)
        print(f"step {number + 1}  loss {float(value):.4f}", flush=True)

    tuned = dataclasses.replace(model, params=params, fingerprint=fingerprint(params))
    save_native(tuned, args.out)
    print(f"decode with --method dmtd --model {args.out}")


if __name__ == "__main__":
    run(main, "dmtd.py")
