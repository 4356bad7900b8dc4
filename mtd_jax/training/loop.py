"""The loop: batches in, steps, evaluations and checkpoints out; stops and goes on at any moment."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from mtd_jax.config import ModelConfig
from mtd_jax.decoding.language_model import LanguageModel
from mtd_jax.decoding.requests import Prompt
from mtd_jax.errors import InputError, RunError
from mtd_jax.training import utilization
from mtd_jax.training.agreement import check_same_everywhere, refused_together
from mtd_jax.training.batches import batches, held_out_batches
from mtd_jax.training.checkpoint import Checkpoints
from mtd_jax.training.config import TrainConfig, to_dict
from mtd_jax.training.devices import batch_sharding, share_of_rows
from mtd_jax.training.evaluate import Decoding, HeldOut
from mtd_jax.training.log import RunLog
from mtd_jax.training.objective import reaches_layers
from mtd_jax.training.preemption import StopRequest
from mtd_jax.training.rows import Rows
from mtd_jax.training.step import Trainer, TrainState
from mtd_jax.transformer.packed import Packed

Evaluation = Callable[[Any, Any], dict[str, float]]
"""(trainable, frozen) -> measurements by name."""

_CHECKPOINTS = "checkpoints"
_SAMPLED_ROWS = 64

# What a run may change between two of its starts without becoming another run.
_MAY_CHANGE = ("model", "out", "memory", "mesh", "checkpoint", "evaluate", "log")
_DATA_MAY_CHANGE = ("cache", "accumulate", "train", "held_out")


@dataclasses.dataclass(frozen=True)
class Run:
    """A run that has been checked: nothing of it is compiled yet."""

    config: TrainConfig
    model: ModelConfig
    fingerprint: str | None
    """The base's, where it is known before its weights are read."""
    load: Callable[[], LanguageModel]
    """Reads the base onto `mesh`. Not read before it is needed, and not kept longer."""
    trainer: Trainer
    mesh: Mesh
    train: Rows
    held_out: Rows | None
    prompts: Sequence[Prompt]
    """To decode at every evaluation."""

    @property
    def directory(self) -> Path:
        """Where everything that the run writes goes."""
        return Path(self.config.out)

    def measured_on(self) -> str:
        """Tells apart held-out rows that a loss is the mean of; empty where there are none."""
        if self.held_out is None:
            return ""
        return f"{self.config.evaluate.batches} batches of {self.held_out.fingerprint}"

    def share(self) -> tuple[int, int]:
        """This process's part of every batch, and of how many."""
        return share_of_rows(self.mesh, self.config.data.batch_size, self.config.data.accumulate)

    def placed(self, local: Packed) -> Packed:
        """A batch on the devices, from the rows that this process brought."""
        size = self.config.data.batch_size
        sharding = batch_sharding(self.mesh)
        return jax.tree.map(
            lambda x: jax.make_array_from_process_local_data(sharding, x, (size, x.shape[1])),
            local,
        )


@dataclasses.dataclass(frozen=True)
class Outcome:
    """How a run ended."""

    state: TrainState
    frozen: Any
    finished: bool
    """False: it was asked to stop, and goes on from its checkpoint when it is started again."""


def fit(run: Run) -> Outcome:
    """Trains to the last step, or until asked to stop; goes on from the newest checkpoint.

    Raises:
      InputError: the directory holds a checkpoint of another run.
      RunError: a loss or gradient was not finite; the checkpoint before it is kept.
    """
    with refused_together():
        run.directory.mkdir(parents=True, exist_ok=True)
    with jax.set_mesh(run.mesh), StopRequest() as stop:
        checkpoints = Checkpoints(
            run.directory / _CHECKPOINTS, run.config.checkpoint, measured_on=run.measured_on()
        )
        try:
            return _fit(run, checkpoints, stop)
        finally:
            checkpoints.close()


def restored(run: Run, which: str) -> Outcome:
    """A kept checkpoint of the run, as `fit` would leave it behind that step; nothing is trained.

    Args:
      which: `best` (by held-out loss), `last`, or the number of a step.

    Raises:
      InputError: there is no such checkpoint, or it is of another run.
    """
    directory = run.directory / _CHECKPOINTS
    if not directory.is_dir():
        raise InputError(f"no checkpoint in {directory}: the run has saved none")
    with jax.set_mesh(run.mesh):
        checkpoints = Checkpoints(
            directory, run.config.checkpoint, measured_on=run.measured_on(), read_only=True
        )
        try:
            step = checkpoints.find(which)
            base = run.load()
            check_same_run(checkpoints.about(step), _about(run, base.fingerprint))
            trainable, frozen = _split(run, base)
            state, _ = checkpoints.restore(step, run.trainer.layout(trainable, run.mesh))
        finally:
            checkpoints.close()
    return Outcome(state, frozen, finished=step == run.config.optimizer.steps)


def behind_step(run: Run) -> int | None:
    """The step of the newest checkpoint, behind which `fit` would go on; None if there is none.

    Weights are not read: where the base's files do not say its fingerprint, a checkpoint of
    another base is found by `fit` alone.

    Raises:
      InputError: the checkpoint is of another run.
    """
    directory = run.directory / _CHECKPOINTS
    if not directory.is_dir():
        return None
    checkpoints = Checkpoints(directory, run.config.checkpoint, read_only=True)
    try:
        newest = checkpoints.latest
        if newest is not None:
            saved = checkpoints.about(newest)
            check_same_run(saved, _about(run, run.fingerprint or saved.get("base")))
    finally:
        checkpoints.close()
    return newest


def _about(run: Run, base: str | None) -> dict[str, Any]:
    """What a checkpoint says of its run, on a base of this fingerprint."""
    return {
        "config": to_dict(run.config),
        "base": base,
        "rows": run.train.fingerprint,
    }


def _split(run: Run, base: LanguageModel) -> tuple[Any, Any]:
    """(trainable, frozen), the latter as the forward pass takes it."""
    trainable, frozen = run.trainer.objective.split(base.params)
    return trainable, jax.tree.map(lambda x: x.astype(run.trainer.compute), frozen)


def _fit(run: Run, checkpoints: Checkpoints, stop: StopRequest) -> Outcome:
    config, trainer = run.config, run.trainer
    base = run.load()
    about = _about(run, base.fingerprint)
    # The texts that it is measured on may change from start to start, not from host to host.
    measured_on = [run.measured_on(), *run.prompts]
    check_same_everywhere({**about, "measured_on": measured_on})
    newest = checkpoints.latest
    if newest is not None:  # before heads are made, which compiles
        check_same_run(checkpoints.about(newest), about)
    trainable, frozen = _split(run, base)
    layout = trainer.layout(trainable, run.mesh)
    number, of = run.share()
    data = batches(
        run.train,
        batch_size=config.data.batch_size,
        seed=config.seed,
        process_index=number,
        process_count=of,
    )
    if newest is None:
        places = jax.tree.map(lambda x: x.sharding, layout)
        state = jax.jit(trainer.start, static_argnums=1, out_shardings=places)(
            trainable, config.seed
        )
    else:
        state, position = checkpoints.restore(newest, layout)
        data.set_state(dict(position))
    first = newest or 0
    steps = config.optimizer.steps
    log = RunLog(
        run.directory, config.log, steps=steps, first=first, writes=jax.process_index() == 0
    )
    with log:
        if newest is not None:
            log.say(f"goes on behind step {newest} of {steps}")
        evaluations = _evaluations(run, base)
        # From here on the base is needed no more; what is frozen has its own reference.
        del base, trainable
        loop = _Loop(run, about, checkpoints, log, state, frozen, evaluations)
        finished = loop.run_to(steps, data, stop)
    return Outcome(loop.state, frozen, finished)


class _Loop:
    """What the loop holds between steps on the host."""

    def __init__(
        self,
        run: Run,
        about: Mapping[str, Any],
        checkpoints: Checkpoints,
        log: RunLog,
        state: TrainState,
        frozen: Any,
        evaluations: Sequence[Evaluation],
    ) -> None:
        self.state = state
        self._run, self._about, self._checkpoints, self._log = run, about, checkpoints, log
        self._frozen, self._evaluations = frozen, evaluations
        self._done = int(jax.device_get(state.step))
        self._pending: list[dict[str, jax.Array]] = []
        self._clock = time.perf_counter()
        self._flops = flops_per_token(run, state.trainable, frozen)
        self._peak = utilization.peak_flops(run.mesh.devices.flat[0]) * run.mesh.size

    def run_to(self, steps: int, data: Any, stop: StopRequest) -> bool:
        """Steps until there are so many; False if asked to stop before."""
        config = self._run.config
        if self._done == steps:
            return True
        batch = self._run.placed(next(data))
        step = self._run.trainer.compile_step(self.state, self._frozen, batch)
        if self._done == 0:
            self._evaluate()
        self._clock = time.perf_counter()
        while True:
            self.state, totals = step(self.state, self._frozen, batch)
            self._done += 1
            self._pending.append(totals)
            position = data.get_state()
            last = self._done == steps
            stopping = stop.reached(self._done)
            saves = last or stopping or self._done % config.checkpoint.every == 0
            if saves or self._done % config.log.every == 0:
                self._flush()
            loss = None
            every = config.evaluate.every
            # Who asks to stop waits for it too: a loss cannot be added to a checkpoint later, and
            # one without a loss is never the best.
            if last or (every and self._done % every == 0):
                self._flush()
                loss = self._evaluate()
            if saves:
                self._checkpoints.save(self._done, self.state, position, self._about, loss)
            if last:
                return True
            if stopping:
                self._log.say(f"asked to stop: saved behind step {self._done} of {steps}")
                return False
            batch = self._run.placed(next(data))

    def _flush(self) -> None:
        """Waits for the device, writes what it measured, and looks whether all was finite."""
        if not self._pending:
            return
        fetched = jax.device_get(self._pending)
        seconds = time.perf_counter() - self._clock
        begin = self._done - len(fetched)
        self._pending = []
        speed = sum(float(values["tokens"]) for values in fetched) / seconds
        timing = {"tokens_per_second": speed, "mfu": speed * self._flops / self._peak}
        failed = int(jax.device_get(self.state.failed))
        for number, values in enumerate(fetched, start=begin):
            if failed < 0 or number < failed:
                line = {name: float(x) for name, x in values.items()}
                last = number + 1 == self._done
                self._log.record(number + 1, line | timing if last else line)
        self._log.flush()
        if failed >= 0:
            values = fetched[failed - begin]
            raise RunError(
                f"step {failed + 1}: loss {float(values['loss']):g}, gradient norm "
                f"{float(values['gradient_norm']):g}, learning rate "
                f"{float(values['learning_rate']):g}; nothing was learned from it. The newest "
                f"checkpoint is behind step {self._checkpoints.latest or 0}"
            )
        self._log.progress(
            self._done,
            {"loss": float(fetched[-1]["loss"]), "tokens/s": speed, "MFU %": 100 * timing["mfu"]},
        )
        self._clock = time.perf_counter()

    def _evaluate(self) -> float | None:
        """Held-out means and what decoding shows; the time does not count as training."""
        began = time.perf_counter()
        found: dict[str, float] = {}
        for evaluation in self._evaluations:
            found |= evaluation(self.state.trainable, self._frozen)
        if found:
            named = {f"held_out_{name}": value for name, value in found.items()}
            self._log.record(self._done, named)
            text = "  ".join(f"{name} {value:.4f}" for name, value in found.items())
            self._log.flush()
            self._log.say(f"step {self._done}  held out: {text}")
        self._clock += time.perf_counter() - began
        return found.get("loss")


def flops_per_token(run: Run, trainable: Any, frozen: Any) -> float:
    """Operations of a step for each token (`utilization`), from shapes and a look at the rows."""
    # From all over: first-fit leaves the small pieces to the first rows.
    rows = range(0, len(run.train), max(1, len(run.train) // _SAMPLED_ROWS))
    segments = np.stack([run.train[i].segments for i in rows])
    keys = utilization.keys_seen(run.model, segments)
    attention = utilization.attention_flops(run.model, keys, backward=reaches_layers(trainable))
    return run.trainer.objective.flops(trainable, frozen) + attention


def held_out_parts(run: Run) -> Iterable[Packed]:
    """The batches that a run is measured on, on its devices; none where nothing is held out."""
    if run.held_out is None:
        return ()
    number, of = run.share()
    local = held_out_batches(
        run.held_out,
        batch_size=run.config.data.batch_size,
        most=run.config.evaluate.batches,
        process_index=number,
        process_count=of,
    )
    return (run.placed(batch) for batch in local)


def _evaluations(run: Run, base: LanguageModel) -> list[Evaluation]:
    config = run.config
    found: list[Evaluation] = []
    if not config.evaluate.every:
        return found
    if run.held_out is not None:
        found.append(HeldOut(run.trainer, lambda: held_out_parts(run)))
    if run.prompts:
        found.append(Decoding(run.trainer, base, run.prompts, config.evaluate.new_tokens))
    return found


def check_same_run(saved: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """Refuses to go on with another run's checkpoint.

    Raises:
      InputError: names the first thing that differs.
    """
    if saved.get("base") != now["base"]:
        raise InputError("the checkpoint in `out` is of another model: choose another `out`")
    before, after = _flat(saved.get("config") or {}), _flat(now["config"])
    for key in sorted(before.keys() | after.keys()):
        table, _, name = key.partition(".")
        if table in _MAY_CHANGE or (table == "data" and name in _DATA_MAY_CHANGE):
            continue
        if before.get(key) != after.get(key):
            raise InputError(
                f"the checkpoint in `out` was made with {key} = {before.get(key)!r}, the config "
                f"says {after.get(key)!r}: choose another `out`, or go on as before"
            )
    if saved.get("rows") != now["rows"]:
        raise InputError("the checkpoint in `out` was trained on other texts: choose another `out`")


def _flat(config: Mapping[str, Any]) -> dict[str, Any]:
    """Keys like `optimizer.steps`; lists as JSON has them."""
    found: dict[str, Any] = {}
    for key, value in config.items():
        if isinstance(value, Mapping):
            found |= {f"{key}.{name}": inner for name, inner in _flat(value).items()}
        else:
            found[key] = list(value) if isinstance(value, tuple) else value
    return found
