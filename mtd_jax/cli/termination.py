"""SIGTERM ends a command as an error does, so that what is half made is removed."""

from __future__ import annotations

import contextlib
import math
import signal
import threading
import time
from collections.abc import Iterator
from types import FrameType

_ONE_REQUEST_SECONDS = 5.0


class Terminated(BaseException):
    """SIGTERM came; schedulers send it before they kill."""


@contextlib.contextmanager
def terminable() -> Iterator[None]:
    """While it is entered SIGTERM raises `Terminated`.

    One that follows soon is not heard: coreutils' `timeout` sends two, and the second would stop
    the removal of what is half made. A later one is: the first may have come in a finaliser, where
    exceptions are lost. Signals reach the main thread alone; elsewhere nothing is changed.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    asked = -math.inf

    def stop(number: int, frame: FrameType | None) -> None:
        del number, frame
        nonlocal asked
        before, asked = asked, time.monotonic()
        if asked - before > _ONE_REQUEST_SECONDS:
            raise Terminated

    former = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, former)
