"""What can go wrong by name, and the wording helpers that go with it."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence


class InputError(ValueError):
    """Something the user gave cannot be used: a flag, a file, a token id, a combination.

    The command line prints the message on one line and exits with code 2; every other exception is
    an internal failure and exits with code 1.
    """


class RunError(RuntimeError):
    """A run came to an end that is nobody's slip: a loss that is not finite, a check that fails.

    The command line prints the message on one line and exits with code 1.
    """


def nearest(name: str, known: Iterable[str], cutoff: float = 0.5) -> str:
    """A " (did you mean 'x'?)" for an unknown `name`, or nothing if no known name is close."""
    matches = difflib.get_close_matches(name, list(known), n=1, cutoff=cutoff)
    return f" (did you mean '{matches[0]}'?)" if matches else ""


def unknown_name(what: str, name: str, known: Iterable[str]) -> InputError:
    """The error for an unknown `name` among `known` ones: names the nearest, or lists them all."""
    known = sorted(known)
    hint = nearest(name, known) or f"; known: {', '.join(known) or 'none'}"
    return InputError(f"unknown {what} '{name}'{hint}")


def listed(names: Sequence[str], most: int = 6, between: str = ", ") -> str:
    """The first `most` of the names, and how many more there are."""
    more = len(names) - most
    return between.join(names[:most]) + (f" and {more} more" if more > 0 else "")


def first_line(error: BaseException) -> str:
    """The first line of another library's error, shortened."""
    lines = str(error).strip().splitlines()
    return (lines[0] if lines else type(error).__name__)[:200]
