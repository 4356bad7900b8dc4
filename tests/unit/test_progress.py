"""What long work shows on stderr."""

from __future__ import annotations

import io

import pytest

from mtd_jax import progress as progress_file
from mtd_jax.progress import progress


class _Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_short_work_writes_nothing_where_nobody_looks(capsys: pytest.CaptureFixture[str]) -> None:
    with progress("reading weights", 2) as shown:
        shown.advance()
        shown.advance()
    assert capsys.readouterr().err == ""


def test_long_work_writes_a_line_now_and_then(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = [0.0]
    monkeypatch.setattr("time.monotonic", lambda: clock[0])
    with progress("answering", 240, done=40) as shown:
        for seconds, note in ((59, "1 tokens/s"), (61, "2 tokens/s"), (100, ""), (121, "")):
            clock[0] = seconds
            shown.advance(note=note)
    lines = capsys.readouterr().err.splitlines()
    assert lines == [
        "answering: 42/240, 2 tokens/s, 1 min",
        "answering: 44/240, 2 tokens/s, 2 min",
    ]


def test_counts_without_a_total(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(progress_file, "LINE_SECONDS", 0.0)
    with progress("answering tasks", None) as shown:
        shown.update(3, description="answering more tasks")
    assert capsys.readouterr().err == "answering more tasks: 3, 0 min\n"


def test_a_terminal_gets_a_bar_that_goes_away(monkeypatch: pytest.MonkeyPatch) -> None:
    stream = _Terminal()
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr("sys.stderr", stream)
    with progress("tokenising [bold]a[/bold].txt", 2) as shown:
        shown.advance(2, note="five tokens/s")
    assert "tokenising [bold]a[/bold].txt" in stream.getvalue()  # names of files are no markup
    assert "2/2" in stream.getvalue()
    assert stream.getvalue().endswith("\x1b[2K")
