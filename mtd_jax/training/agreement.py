"""Several processes of one run agree: on what is refused, and that all were started alike.

They talk through the coordination service that `jax.distributed` starts, not by a collective of the
devices: on CPUs the first of those waits 30 seconds for the others, on TPUs one may wait for ever,
and a host may read texts for longer than another.
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import json
import time
from collections.abc import Iterator, Mapping
from typing import Any

import jax

from mtd_jax.errors import InputError, first_line

_PATIENCE = 6 * 3600
"""Seconds that the slowest process may take; one that died is noticed by its missing heartbeat."""

_meetings = itertools.count()
"""The same in every process, as all of them come to the same meetings in the same order."""


@contextlib.contextmanager
def refused_together() -> Iterator[None]:
    """What one process of several refuses within (`InputError`, `OSError`), all of them refuse.

    They meet at its end, so that none waits for another that has gone. Within there must be no
    collective: who refuses would never come to it.

    Raises:
      InputError: on the others too, with what that process said.
    """
    if jax.process_count() == 1:
        yield
        return
    meeting = next(_meetings)
    try:
        yield
    except Exception as error:
        what = "refused" if isinstance(error, InputError | OSError) else "failed"
        # Whether or not the others can still be told, this is what was wrong here.
        with contextlib.suppress(Exception):
            _tell_all(meeting, f"{what}: {first_line(error)}")
        raise
    except BaseException:  # interrupted: nobody here waits any longer
        with contextlib.suppress(Exception):
            _tell(meeting, "was interrupted")
        raise
    for number, text in enumerate(_tell_all(meeting, "")):
        if text:
            raise InputError(f"process {number} of this run {text}")


def check_same_everywhere(about: Mapping[str, Any]) -> None:
    """Refuses processes that were started with different configs, texts or models.

    Raises:
      InputError: on all of them.
    """
    if jax.process_count() == 1:
        return
    text = json.dumps(about, sort_keys=True, default=str)
    digest = hashlib.sha256(text.encode()).hexdigest()
    if len(set(_tell_all(next(_meetings), digest))) > 1:
        raise InputError("the processes of this run differ in their config, texts or model")


def _service() -> Any:
    # Not public in JAX; Orbax and others take it from here too.
    from jax._src import distributed

    return distributed.global_state.client


def _tell(meeting: int, text: str) -> None:
    _service().key_value_set(f"mtd-jax/meeting-{meeting}/{jax.process_index()}", text)


def _tell_all(meeting: int, text: str) -> list[str]:
    """What every process says, in their order; all have come when it returns.

    Raises:
      InputError: not all of them came.
    """
    until = time.monotonic() + _PATIENCE
    try:
        _tell(meeting, text)
        return [_hear(meeting, index, until) for index in range(jax.process_count())]
    except RuntimeError as error:
        raise InputError(
            f"the other processes of this run did not come: {first_line(error)}"
        ) from None


def _hear(meeting: int, index: int, until: float) -> str:
    while True:
        try:  # a second at a time, as no signal is handled meanwhile
            said: str = _service().blocking_key_value_get(
                f"mtd-jax/meeting-{meeting}/{index}", 1000
            )
            return said
        except RuntimeError as error:
            if "DEADLINE_EXCEEDED" not in str(error) or time.monotonic() > until:
                raise
