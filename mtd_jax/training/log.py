"""What a run writes while it goes on: log.jsonl, TensorBoard events, lines or a bar."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import TracebackType
from typing import Any

from mtd_jax.errors import InputError
from mtd_jax.training.config import LogConfig
from mtd_jax.typing import is_number

FILE = "log.jsonl"


class RunLog:
    """One line a step in log.jsonl, the same as TensorBoard scalars, and progress on stderr.

    A run that goes on from a checkpoint takes back the lines written after it, so the file always
    reads as if nothing had happened. Only the first process of a run writes.
    """

    def __init__(
        self, directory: Path, config: LogConfig, *, steps: int, first: int, writes: bool
    ) -> None:
        self._writes = writes
        self._bar: Any = None
        self._events: Any = None
        if not writes:
            return
        path = directory / FILE
        _cut(path, first)
        # One for the life of the object; closed with it.
        self._file = path.open("a", encoding="utf-8")
        if config.tensorboard:
            self._events = _event_writer(directory / "events", first)
            if self._events is None:
                self.say("no event files for TensorBoard: pip install tensorboardX makes them")
        if sys.stderr.isatty():
            self._bar = _bar(steps, first)

    def __enter__(self) -> RunLog:
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if not self._writes:
            return
        self._file.close()
        if self._events is not None:
            self._events.close()
        if self._bar is not None:
            self._bar.stop()

    def record(self, step: int, values: dict[str, float]) -> None:
        """Numbers of the moment when so many steps are done."""
        if not self._writes:
            return
        self._file.write(json.dumps({"step": step, **values}) + "\n")
        if self._events is not None:
            for name, value in values.items():
                self._events.add_scalar(name, value, step)

    def flush(self) -> None:
        """Everything recorded is on disk."""
        if self._writes:
            self._file.flush()

    def progress(self, step: int, values: dict[str, float]) -> None:
        """Shows how far it is: `step` steps are done."""
        if not self._writes:
            return
        text = "  ".join(f"{name} {_short(value)}" for name, value in values.items())
        if self._bar is not None:
            self._bar.update(self._bar.task_ids[0], completed=step, description=text)
        else:
            _write_line(f"step {step}  {text}")

    def say(self, text: str) -> None:
        """A line for people."""
        if not self._writes:
            return
        if self._bar is not None:
            self._bar.console.print(text, markup=False, highlight=False)
        else:
            _write_line(text)


def read_log(directory: Path) -> list[dict[str, float]]:
    """The lines of log.jsonl; a last one that is not whole is left out.

    Raises:
      InputError: a line is not as it was written.
    """
    path = directory / FILE
    if not path.exists():
        return []
    lines = path.read_bytes().split(b"\n")[:-1]
    found: list[dict[str, float]] = []
    for number, line in enumerate(lines, start=1):
        if not line:
            continue
        try:
            values = json.loads(line.decode("utf-8"))
        except ValueError as error:
            raise InputError(f"{path}, line {number}: {error}") from None
        if not isinstance(values, dict) or not is_number(values.get("step")):
            raise InputError(f"{path}, line {number} is no line of a log")
        found.append(values)
    return found


def _cut(path: Path, first: int) -> None:
    """Takes back what was recorded behind step `first`."""
    kept = [line for line in read_log(path.parent) if line["step"] <= first]
    if first == 0:
        kept = []  # a run that begins evaluates anew before its first step
    partial = path.with_suffix(".part")
    partial.write_text("".join(json.dumps(line) + "\n" for line in kept), encoding="utf-8")
    partial.replace(path)


def _event_writer(directory: Path, first: int) -> Any:
    try:
        from tensorboardX import SummaryWriter
    except ImportError:
        return None
    # TensorBoard itself drops what a resumed run overwrites.
    return SummaryWriter(str(directory), purge_step=first, write_to_disk=True)


def _bar(steps: int, first: int) -> Any:
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    bar = Progress(
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.description}"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        console=Console(stderr=True),
    )
    bar.add_task("compiling", total=steps, completed=first)
    return bar


def _write_line(text: str) -> None:
    sys.stderr.write(f"{text}\n")
    sys.stderr.flush()


def _short(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"
