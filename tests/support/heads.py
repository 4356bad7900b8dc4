"""Heads for tiny models: some that are right often, and some that never are."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from mtd_jax import generate, methods
from mtd_jax.convert.heads import save_heads
from mtd_jax.decoding.heads import Heads, HeadsSpec
from mtd_jax.decoding.language_model import LanguageModel
from mtd_jax.training.heads import HeadsTraining, measured
from mtd_jax.transformer.packed import Packed

CHUNK = 64


def packed(texts: Sequence[Sequence[int]]) -> Packed:
    """A row for every text."""
    width = max(len(text) for text in texts)
    tokens = np.zeros((len(texts), width), np.int32)
    for row, text in enumerate(texts):
        tokens[row, : len(text)] = text
    index = np.broadcast_to(np.arange(width, dtype=np.int32), tokens.shape)
    real = index < np.array([len(text) for text in texts])[:, None]
    arrays = (tokens, real.astype(np.int32), index * real, real, real & (index > 0))
    return Packed(*map(jnp.asarray, arrays))


def answers(model: LanguageModel, prompts: Sequence[Sequence[int]], count: int) -> list[list[int]]:
    """The prompts with what the model says to them."""
    done = generate(
        model,
        methods.autoregressive(),
        [list(p) for p in prompts],
        max_new_tokens=count,
        ignore_eos=True,
    )
    return [[*p, *c.token_ids] for p, c in zip(prompts, done, strict=True)]


def random(model: LanguageModel, name: str = "medusa", seed: int = 0, **options: Any) -> Heads:
    """Heads as bad as can be."""
    spec = methods.make_spec(name, options)
    weights = spec.initial(model.params, jax.random.key(seed))
    leaves, structure = jax.tree.flatten(weights)
    keys = jax.random.split(jax.random.key(seed), len(leaves))
    drawn = [jax.random.normal(k, x.shape) for k, x in zip(keys, leaves, strict=True)]
    return Heads(name, options, model.fingerprint, jax.tree.unflatten(structure, drawn))


def fitted(
    model: LanguageModel,
    texts: Sequence[Sequence[int]],
    name: str = "medusa",
    steps: int = 60,
    **options: Any,
) -> Heads:
    """Heads that know these texts, with measured accuracies."""
    spec: HeadsSpec = methods.make_spec(name, options)
    batch = packed(texts)
    base = model.params
    weights = spec.initial(base, jax.random.key(0))
    optimizer = optax.adam(3e-2)

    @jax.jit
    def step(carry: Any, _: None) -> Any:
        weights, state = carry
        counts = spec.counts(batch)
        grads = jax.grad(lambda w: spec.training_loss(w, base, batch, counts, chunk=CHUNK)[0])(
            weights
        )
        with jax.numpy_dtype_promotion("standard"):
            updates, state = optimizer.update(grads, state, weights)
        return (optax.apply_updates(weights, updates), state), None

    carry = (weights, optimizer.init(weights))
    for _ in range(steps):
        carry, _none = step(carry, None)
    objective = HeadsTraining(spec, tuple(sorted(options.items())), seed=0, chunk=CHUNK)
    record = measured(objective, carry[0], base, [batch])
    return Heads(name, options, model.fingerprint, carry[0], record)


def training_bytes(spec: HeadsSpec, base: Any, batch: Any, chunk: int) -> int:
    """What a step's gradient keeps beside its arguments; of abstract arrays."""
    weights = jax.eval_shape(spec.initial, base, jax.random.key(0))

    def step(weights: Any, base: Any, batch: Any) -> Any:
        counts = spec.counts(batch)
        return jax.grad(lambda w: spec.training_loss(w, base, batch, counts, chunk=chunk)[0])(
            weights
        )

    compiled: Any = jax.jit(step).lower(weights, base, batch).compile()
    return int(compiled.memory_analysis().temp_size_in_bytes)


def write(heads: Heads, directory: Path) -> Path:
    save_heads(heads, directory)
    return directory
