"""Training of Hidden Transfer's maps from start to finish on one page.

    python -m train.hidden_transfer --model models/smollm2-135m-instruct --data a.jsonl --out maps

Here the optimiser is plain and the loss stands open: what the base makes of the text, what it makes
of pseudo rows beside it, and the divergence of the two (`mtd_jax/methods/transfer.py`).
`mtd train configs/hidden_transfer/smollm2-135m.toml` learns the same; around it, it adds what a
long run needs (mtd_jax/training/loop.py), and measures how often the guesses are right.
"""

from __future__ import annotations

from itertools import islice
from typing import Any

import jax
import jax.numpy as jnp
import optax

from mtd_jax.cli.page import run
from mtd_jax.convert.heads import save_heads
from mtd_jax.convert.load import load_as_stored
from mtd_jax.decoding.heads import Heads
from mtd_jax.methods.transfer import HiddenTransferSpec, hidden_states
from mtd_jax.training.batches import batches
from mtd_jax.training.data import prepare
from mtd_jax.transformer.losses import divergences
from mtd_jax.transformer.model import Parameters, normed
from mtd_jax.transformer.packed import Packed
from train.common import make_config, make_parser


def loss(weights: Any, base: Parameters, batch: Packed, spec: HiddenTransferSpec) -> Any:
    """sum_i decay^i mean_n KL(the base at n + i + 1 || pseudo row i of n), i from 0."""
    x, pseudo = hidden_states(spec.way(base.config), weights, base, batch)
    wanted = jnp.stack([batch.targets(i + 2)[1] for i in range(spec.count)], axis=2)
    share = wanted / jnp.maximum(wanted.sum((0, 1), dtype=jnp.float32), 1.0)
    decay = spec.decay ** jnp.arange(spec.count, dtype=jnp.float32)
    rows, guesses = normed(base, x), normed(base, pseudo)
    total, right = divergences(base, rows, guesses, decay.reshape(1, 1, -1) * share, chunk=256)
    return total, right / jnp.maximum(wanted.sum((0, 1)), 1)


def main() -> None:
    """Trains for a number of steps and writes the maps."""
    parser = make_parser(__doc__)
    parser.add_argument("--maps", type=int, default=3, metavar="K", help="places to guess")
    parser.add_argument("--layers", default="", help="where the maps stand: 14,16,18")
    args = parser.parse_args()
    data = make_config(args, learning_rate=1e-3).data
    spec = HiddenTransferSpec(count=args.maps, layers=args.layers)

    model = load_as_stored(args.model)
    base, weights = model.params, spec.initial(model.params, jax.random.key(0))
    cache = args.out.with_name(f"{args.out.name}.tokens")
    rows = prepare(data, model.tokenizer, model.config, seed=0, cache=cache).train
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(1e-3))

    # The maps are what is differentiated; the model is an argument like the batch.
    @jax.jit
    def step(weights: Any, state: Any, base: Parameters, batch: Packed) -> Any:
        measured, grads = jax.value_and_grad(loss, has_aux=True)(weights, base, batch, spec)
        updates, state = optimizer.update(grads, state, weights)
        return optax.apply_updates(weights, updates), state, measured

    state = optimizer.init(weights)
    some = islice(batches(rows, batch_size=args.batch_size, seed=0), args.steps)
    for number, batch in enumerate(some, start=1):
        weights, state, (total, right) = step(weights, state, base, batch)
        shares = "  ".join(f"{share:.3f}" for share in right.tolist())
        print(f"step {number}  loss {float(total):.4f}  right {shares}", flush=True)

    options = {"count": spec.count, "layers": spec.layers}
    done = Heads(spec.name, options, model.fingerprint, weights, {"steps": args.steps})
    save_heads(done, args.out, dtype="bfloat16")
    print(f"decode with --method hidden_transfer --heads {args.out}")


if __name__ == "__main__":
    run(main, "hidden_transfer.py")
