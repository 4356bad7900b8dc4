"""How far work is that takes minutes, on stderr: a bar on a terminal, elsewhere a line a minute."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Iterator
from typing import Any

LINE_SECONDS = 60.0
"""Between two lines where stderr is no terminal; work that ends sooner writes none."""


class Progress:
    """What `progress` yields: is told what is done, and shows it."""

    def __init__(self, description: str, total: int | None, done: int, bar: Any) -> None:
        self._description, self._total, self._note = description, total, ""
        self._done, self._bar = done, bar
        self._began = time.monotonic()
        self._due = self._began + LINE_SECONDS

    @property
    def elapsed(self) -> float:
        """Seconds since it began."""
        return time.monotonic() - self._began

    def advance(self, steps: int = 1, *, description: str = "", note: str = "") -> None:
        """So many more steps are done."""
        self.update(self._done + steps, description=description, note=note)

    def update(self, done: int | None = None, *, description: str = "", note: str = "") -> None:
        """So many steps are done in all; what stays out stays as it was."""
        self._done = self._done if done is None else done
        self._description = description or self._description
        self._note = note or self._note
        if self._bar is not None:
            task = self._bar.task_ids[0]
            shown = {"description": self._description, "note": self._note}
            self._bar.update(task, completed=self._done, **shown)
        elif time.monotonic() >= self._due:
            self._due = time.monotonic() + LINE_SECONDS
            sys.stderr.write(self._line() + "\n")
            sys.stderr.flush()

    def _line(self) -> str:
        count = str(self._done) if self._total is None else f"{self._done}/{self._total}"
        parts = [count, self._note, f"{self.elapsed / 60:.0f} min"]
        return f"{self._description}: {', '.join(filter(None, parts))}"


@contextlib.contextmanager
def progress(description: str, total: int | None, *, done: int = 0) -> Iterator[Progress]:
    """Shows how many of `total` steps are done, of which `done` were before; None: nobody knows."""
    if not sys.stderr.isatty():
        yield Progress(description, total, done, None)
        return
    from rich import progress as rich
    from rich.console import Console

    columns = (
        rich.TextColumn("{task.description}", markup=False),
        rich.BarColumn(),
        rich.MofNCompleteColumn(),
        rich.TextColumn("{task.fields[note]}", markup=False),
        rich.TimeElapsedColumn(),
        rich.TimeRemainingColumn(),
    )
    with rich.Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        bar.add_task(description, total=total, completed=done, note="")
        yield Progress(description, total, done, bar)
