"""One step of training, as a pure function of state, frozen weights and batch."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import struct
from jax import lax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from mtd_jax.sharding import constrain
from mtd_jax.training.config import TrainConfig
from mtd_jax.training.objective import Counts, Objective, make_objective
from mtd_jax.training.optimizer import make_optimizer, make_schedule
from mtd_jax.transformer.losses import Totals
from mtd_jax.transformer.packed import Packed
from mtd_jax.typing import DTypeLike, Leaf


class TrainState(struct.PyTreeNode):
    """All that a step changes, and all that a checkpoint keeps of the device's memory."""

    step: Leaf
    """[] int32: steps done."""
    trainable: Any
    """float32"""
    optimizer: Any
    key: Leaf
    """[2] uint32: data of a PRNG key that is never used itself; each step folds its number in."""
    failed: Leaf
    """[] int32: the step whose loss or gradient was not finite; -1 while all is well. From then on
    nothing changes any more, so the weights are those from before it."""


@dataclasses.dataclass(frozen=True)
class Trainer:
    """What a run's programs are made of; holds no arrays."""

    objective: Objective
    optimizer: optax.GradientTransformation
    schedule: optax.Schedule
    """Learning rate by step, as the optimiser has it."""
    accumulate: int
    compute: DTypeLike
    """Weights are cast to it for the forward and backward pass."""

    @classmethod
    def of(cls, config: TrainConfig, platform: str | None = None) -> Trainer:
        """The trainer of a run, for the backend there is or another platform."""
        compute = config.memory.compute
        if compute == "auto":
            cpu = (platform or jax.default_backend()) == "cpu"
            compute = "float32" if cpu else "bfloat16"
        return cls(
            objective=make_objective(config),
            optimizer=make_optimizer(config.optimizer),
            schedule=make_schedule(config.optimizer),
            accumulate=config.data.accumulate,
            compute=jnp.dtype(compute),
        )

    def layout(self, trainable: Any, mesh: Mesh) -> TrainState:
        """The state's shapes, dtypes and shardings; `trainable` says its own shardings.

        Moments of the optimiser lie where their weights lie.
        """
        shapes = jax.eval_shape(lambda weights: self.start(weights, 0), trainable)
        whole = NamedSharding(mesh, PartitionSpec())

        def placed(x: Any, sharding: Any) -> Any:
            return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)

        def everywhere(x: Any) -> Any:
            return placed(x, whole)

        where = jax.tree.map(lambda x: x.sharding, trainable)
        return TrainState(
            step=everywhere(shapes.step),
            trainable=jax.tree.map(placed, shapes.trainable, where),
            optimizer=optax.tree_map_params(
                self.optimizer,
                placed,
                shapes.optimizer,
                where,
                transform_non_params=everywhere,
            ),
            key=everywhere(shapes.key),
            failed=everywhere(shapes.failed),
        )

    def start(self, trainable: Any, seed: int) -> TrainState:
        """The state before the first step; `trainable` becomes float32."""
        weights = jax.tree.map(lambda x: x.astype(jnp.float32), trainable)
        return TrainState(
            step=jnp.int32(0),
            trainable=weights,
            optimizer=self.optimizer.init(weights),
            key=jax.random.key_data(jax.random.key(seed)),
            failed=jnp.int32(-1),
        )

    def step(self, state: TrainState, frozen: Any, batch: Packed) -> tuple[TrainState, Totals]:
        """One update from a whole batch [B, T], and what was measured on the way.

        The batch is taken in `accumulate` parts; sums over parts equal the whole, because each is
        divided by the counts of the whole batch.
        """
        counts = self.objective.counts(batch)
        key = jax.random.fold_in(jax.random.wrap_key_data(state.key), state.step)
        weights = _cast(state.trainable, self.compute)
        gradient = jax.grad(self.objective.loss, has_aux=True)

        def part(number: jax.Array, batch: Packed) -> tuple[Any, Totals]:
            part_key = jax.random.fold_in(key, number)
            found, totals = gradient(weights, frozen, batch, counts, part_key)
            return _cast(found, jnp.float32), totals

        if self.accumulate == 1:
            grads, totals = part(jnp.int32(0), batch)
        else:

            def add(carry: Any, item: tuple[jax.Array, Packed]) -> tuple[Any, None]:
                return jax.tree.map(jnp.add, carry, part(*item)), None

            parts = _parts(batch, self.accumulate)
            numbers = jnp.arange(self.accumulate, dtype=jnp.int32)
            first = jax.tree.map(lambda x: x[0], parts)
            shapes = jax.eval_shape(part, jnp.int32(0), first)
            nothing = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
            (grads, totals), _ = lax.scan(add, nothing, (numbers, parts))
        real = (batch.segments > 0).sum(dtype=jnp.float32)
        return self._update(state, grads, {**totals, "tokens": real})

    def compile_step(self, state: TrainState, frozen: Any, batch: Packed) -> jax.stages.Compiled:
        """`step` as a program for these arrays or abstract arrays; it takes the state's memory."""
        places = jax.tree.map(lambda x: x.sharding, state)
        step = jax.jit(self.step, donate_argnums=0, out_shardings=(places, None))
        return step.lower(state, frozen, batch).compile()

    def measure(self, trainable: Any, frozen: Any, batch: Packed, counts: Counts) -> Totals:
        """The objective's measurements without an update; `counts` of all that is averaged over."""
        weights = _cast(trainable, self.compute)
        return self.objective.loss(weights, frozen, batch, counts, None)[1]

    def _update(self, state: TrainState, grads: Any, totals: Totals) -> tuple[TrainState, Totals]:
        norm = optax.tree.norm(grads)
        # optax promotes its step counts to floats by itself.
        with jax.numpy_dtype_promotion("standard"):
            updates, optimizer = self.optimizer.update(grads, state.optimizer, state.trainable)
            rate = jnp.asarray(self.schedule(state.step), jnp.float32)
        updated = optax.apply_updates(state.trainable, updates)
        # Then AdamW's update is finite too: the config bounds its epsilon and its rate.
        finite = [jnp.isfinite(x) for x in (totals["loss"], norm, rate)]
        sound = jnp.all(jnp.stack(finite)) & (state.failed < 0)

        def keep(new: jax.Array, old: jax.Array) -> jax.Array:
            return jnp.where(sound, new, old)

        failed = jnp.where(sound | (state.failed >= 0), state.failed, state.step)
        after = TrainState(
            step=state.step + sound.astype(jnp.int32),
            trainable=jax.tree.map(keep, updated, state.trainable),
            optimizer=jax.tree.map(keep, optimizer, state.optimizer),
            key=state.key,
            failed=failed,
        )
        return after, {**totals, "gradient_norm": norm, "learning_rate": rate}


def _parts(batch: Packed, parts: int) -> Packed:
    """[B, T] -> [parts, B / parts, T]; every part has rows of every device."""

    def split(x: jax.Array) -> jax.Array:
        x = x.reshape(x.shape[0] // parts, parts, *x.shape[1:]).swapaxes(0, 1)
        return constrain(x, None, "batch", *[None] * (x.ndim - 2))

    return jax.tree.map(split, batch)


def _cast(tree: Any, dtype: DTypeLike) -> Any:
    return jax.tree.map(lambda x: x.astype(dtype), tree)
