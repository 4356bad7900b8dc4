"""Stop strings in text that arrives in pieces."""

from __future__ import annotations

from collections.abc import Sequence

from mtd_jax.errors import InputError


class StopMatcher:
    """Finds the stop string that is complete first, wherever pieces and tokens break it.

    Text that could still be the beginning of a stop string is held back until it is decided.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        if stops is None or not all(isinstance(stop, str) and stop for stop in stops):
            raise InputError("stop strings must be text, and not empty")
        self._stops = tuple(stops)
        self._held = ""
        self.stopped = False
        """A stop string was found; nothing more is released."""

    def push(self, text: str) -> str:
        """Takes the next piece of text and returns what can be shown of all so far."""
        if self.stopped:
            return ""
        self._held += text
        found = [(at + len(stop), at) for stop in self._stops if (at := self._held.find(stop)) >= 0]
        if found:
            self.stopped = True
            return self._release(min(found)[1])
        return self._release(len(self._held) - self._open_end())

    def flush(self) -> str:
        """What was held back, once no more text comes."""
        return "" if self.stopped else self._release(len(self._held))

    def _release(self, length: int) -> str:
        shown, self._held = self._held[:length], self._held[length:]
        return shown

    def _open_end(self) -> int:
        """Length of the longest end of the held text that begins a stop string."""
        longest = max((len(stop) for stop in self._stops), default=1) - 1
        for length in range(min(longest, len(self._held)), 0, -1):
            end = self._held[-length:]
            if any(stop.startswith(end) for stop in self._stops):
                return length
        return 0
