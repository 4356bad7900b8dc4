"""Checkpoints of a run, through Orbax: written in the background, whole or not at all.

A checkpoint holds the state, where the data stands, and what the run is. It is restored onto
whatever devices the run now has: Orbax reads each device its part.
"""

from __future__ import annotations

import contextlib
import logging
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from mtd_jax.errors import InputError, first_line
from mtd_jax.training.config import CheckpointConfig
from mtd_jax.training.step import TrainState

_SILENT = ("absl",)


class Checkpoints:
    """The checkpoints in one directory, by step."""

    def __init__(
        self,
        directory: Path,
        config: CheckpointConfig,
        *,
        measured_on: str = "",
        read_only: bool = False,
    ) -> None:
        """Opens the directory; what a killed run left half-written is removed.

        Args:
          measured_on: tells apart held-out texts: a loss on others is no better and no worse, so
            with new texts the search for the best begins anew.
          read_only: change nothing: the run may be going on, and be writing.
        """
        import orbax.checkpoint as ocp
        from orbax.checkpoint import checkpoint_managers as policies

        for name in _SILENT:  # Orbax reports every save at length
            logging.getLogger(name).setLevel(logging.ERROR)
        keep = [policies.LatestN(config.keep_last)]
        if config.keep_best:
            keep.append(
                policies.BestN(
                    get_metric_fn=lambda metrics: -self._loss(metrics),
                    n=config.keep_best,
                    keep_checkpoints_without_metrics=False,
                )
            )
        self._ocp, self._measured_on = ocp, measured_on
        self._manager = ocp.CheckpointManager(
            directory.absolute(),
            item_names=("state", "data", "about"),
            options=ocp.CheckpointManagerOptions(
                # Without it metrics are kept in memory alone, and a restart forgets which was best.
                best_fn=self._loss,
                best_mode="min",
                preservation_policy=policies.AnyPreservationPolicy(keep),
                cleanup_tmp_directories=not read_only,
                read_only=read_only,
                # This run says when; by default Orbax also saves on preemption by itself.
                save_decision_policy=policies.EveryNSteps(1),
            ),
        )

    @property
    def latest(self) -> int | None:
        """The newest step there is."""
        step: int | None = self._manager.latest_step()
        return step

    @property
    def best(self) -> int | None:
        """The step with the lowest loss on these texts among those kept; None if none has any."""
        losses = {
            step: loss
            for step in self._manager.all_steps()
            if (metrics := self._manager.metrics(step)) is not None
            and (loss := self._loss(metrics)) < math.inf
        }
        return min(losses, key=lambda step: losses[step]) if losses else None

    def _loss(self, metrics: Mapping[str, Any]) -> float:
        """The held-out loss of a checkpoint; infinite where it was measured on other texts."""
        # Runs of before this was written down are taken to be measured on the same texts.
        same = metrics.get("measured_on", self._measured_on) == self._measured_on
        return float(metrics["loss"]) if same else math.inf

    def find(self, which: str) -> int:
        """The step that `best`, `last` or a number means.

        Raises:
          InputError: it means none that is kept.
        """
        where = self._manager.directory
        steps = sorted(self._manager.all_steps())
        if not steps:
            raise InputError(f"no checkpoint in {where}: the run has saved none")
        kept = ", ".join(map(str, steps))
        if which == "last":
            return int(steps[-1])
        if which == "best":
            if self.best is None:
                raise InputError(
                    f"no checkpoint in {where} was evaluated on the held-out texts of the config "
                    f"(there are {kept})"
                )
            return self.best
        if not which.isdecimal():
            raise InputError(f"a checkpoint is best, last or a step, got '{which[:40]}'")
        if int(which) not in steps:
            raise InputError(f"no checkpoint behind step {which} in {where} (there are {kept})")
        return int(which)

    def save(
        self,
        step: int,
        state: TrainState,
        data: Mapping[str, Any],
        about: Mapping[str, Any],
        held_out_loss: float | None,
    ) -> None:
        """Begins to write; returns when the state may be donated. An older save is waited for.

        Raises:
          InputError: it, or an older one, cannot be written: a full disk.
        """
        if step in self._manager.all_steps():
            return
        ocp = self._ocp
        with self._written():
            self._manager.save(
                step,
                args=ocp.args.Composite(
                    state=ocp.args.StandardSave(state),
                    data=ocp.args.JsonSave(dict(data)),
                    about=ocp.args.JsonSave(dict(about)),
                ),
                metrics=None
                if held_out_loss is None
                else {"loss": held_out_loss, "measured_on": self._measured_on},
                force=True,
            )

    def about(self, step: int) -> Mapping[str, Any]:
        """What the run said of itself."""
        args = self._ocp.args.Composite(about=self._ocp.args.JsonRestore())
        found: Mapping[str, Any] = self._restored(step, args)["about"]
        return found

    def restore(self, step: int, layout: TrainState) -> tuple[TrainState, Mapping[str, Any]]:
        """State and data position; arrays come onto the devices that `layout` names.

        Raises:
          InputError: the checkpoint cannot be read, or is of other weights.
        """
        args = self._ocp.args.Composite(
            state=self._ocp.args.StandardRestore(layout), data=self._ocp.args.JsonRestore()
        )
        restored = self._restored(step, args)
        return restored["state"], restored["data"]

    def close(self) -> None:
        """Waits for what is being written.

        Raises:
          InputError: it could not be.
        """
        with self._written():
            self._manager.close()

    @contextlib.contextmanager
    def _written(self) -> Iterator[None]:
        # Orbax writes behind our back, and says in the next call what went wrong.
        try:
            yield
        except (ValueError, OSError) as error:
            raise InputError(
                f"cannot write a checkpoint under {self._manager.directory}: {first_line(error)}"
            ) from error

    def _restored(self, step: int, args: Any) -> Any:
        try:
            return self._manager.restore(step, args=args)
        except Exception as error:  # Orbax raises bare ones where a file is cut
            where = f"{self._manager.directory}/{step}"
            older = [kept for kept in self._manager.all_steps() if kept < step]
            advice = f"; without that directory it goes on from step {max(older)}" if older else ""
            raise InputError(
                f"cannot restore the checkpoint {where}: {first_line(error)}{advice}"
            ) from error
