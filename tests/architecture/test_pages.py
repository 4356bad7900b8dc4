"""The pages say what the results say."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks import tables


@pytest.mark.parametrize("page", tables.PAGES, ids=lambda p: p.name)
def test_tables_are_those_of_the_results(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    assert "<!-- table" in text
    assert tables.rendered(text) == text, "run python benchmarks/tables.py"
