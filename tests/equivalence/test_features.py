"""docs/features.md says of every method what it really does."""

from __future__ import annotations

import pytest

from tests.support import features

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore:these weights were not trained"),
]


@pytest.mark.parametrize("name", features.METHODS)
def test_the_page_says_what_a_method_does(name: str) -> None:
    page = features.PAGE.read_text(encoding="utf-8")
    assert features.line(name) in page, "run python -m tests.support.features"


def test_the_page_has_every_feature() -> None:
    page = features.PAGE.read_text(encoding="utf-8")
    assert f"| method | {' | '.join(features.FEATURES)} |\n" in page
