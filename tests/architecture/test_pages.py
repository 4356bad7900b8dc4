"""The pages say what the results say."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks import report


@pytest.mark.parametrize("page", report.PAGES, ids=lambda p: p.name)
def test_tables_are_those_of_the_results(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    assert "<!-- table" in text
    assert report.rendered(text) == text, "run python -m benchmarks.report"
