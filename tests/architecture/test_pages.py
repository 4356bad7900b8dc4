"""The pages say what the results say."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks import report


@pytest.mark.parametrize("page", report.PAGES, ids=lambda p: p.name)
def test_tables_are_those_of_the_results(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    assert report.rendered(text) == text, "run python -m benchmarks.report"


def test_every_table_stands_on_a_page() -> None:
    pages = "".join(page.read_text(encoding="utf-8") for page in report.PAGES)
    missing = [name for name in report.TABLES if f"<!-- table {name} -->\n" not in pages]
    assert not missing
