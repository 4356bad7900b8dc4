from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mtd_jax.decoding.stopping import StopMatcher
from mtd_jax.errors import InputError


def _expected(text: str, stops: list[str]) -> str:
    found = [at for stop in stops if (at := text.find(stop)) >= 0]
    return text[: min(found)] if found else text


@given(
    st.lists(st.text("abc", max_size=3), max_size=12),
    st.lists(st.text("abc", min_size=1, max_size=4), max_size=3),
)
def test_pieces_do_not_matter(pieces: list[str], stops: list[str]) -> None:
    """However the text is cut, what is shown ends before the first stop string found so far.

    Pieces are pushed a character at a time, so the first string to be completed is the one found.
    """
    matcher = StopMatcher(stops)
    text = "".join(pieces)
    shown = ""
    for character in text:
        shown += matcher.push(character)
        assert text.startswith(shown)
        assert not any(stop in shown for stop in stops)
    shown += matcher.flush()
    completed = [text.find(s) + len(s) for s in stops if s in text]
    seen = text[: min(completed)] if completed else text
    assert shown == _expected(seen, stops)
    assert matcher.stopped == bool(completed)


def test_of_two_stop_strings_the_one_complete_first_wins() -> None:
    for pieces in (["abcd"], ["abc", "d"], ["a", "b", "c", "d"]):
        matcher = StopMatcher(["abcd", "c"])
        assert "".join(matcher.push(piece) for piece in pieces) == "ab"


def test_nothing_is_held_back_without_need() -> None:
    matcher = StopMatcher(["END"])
    assert matcher.push("hello E") == "hello "
    assert matcher.push("a") == "Ea"
    assert matcher.push("EN") == ""
    assert matcher.push("D and more") == ""
    assert matcher.stopped
    assert matcher.push("x") == matcher.flush() == ""


def test_empty_stop_string_is_refused() -> None:
    with pytest.raises(InputError, match="empty"):
        StopMatcher(["a", ""])
