"""Several processes of one run agree: on what is refused, and that all were started alike.

They talk through the coordination service that `jax.distributed` starts, not by a collective of the
devices: on CPUs the first of those waits 30 seconds for the others, and one host may read texts for
longer than another.
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import json
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

    They meet at its end, so that none waits for another that has gone.

    Raises:
      InputError: on the others too, with what that process said.
    """
    if jax.process_count() == 1:
        yield
        return
    try:
        yield
    except Exception as error:
        refuses = isinstance(error, InputError | OSError)
        said = f"{'refused' if refuses else 'failed'}: {first_line(error)}"
        # Whether or not the others can still be told, this is what was wrong here.
        others = []
        with contextlib.suppress(Exception):
            others = _tell_all(said)
        if not refuses:  # what failed here may have failed because another refused
            _refuse(others, "refused")
        raise
    _refuse(_tell_all(""), "")


def check_same_everywhere(about: Mapping[str, Any]) -> None:
    """Refuses processes that were started with different configs, texts or models.

    Raises:
      InputError: on all of them.
    """
    if jax.process_count() == 1:
        return
    text = json.dumps(about, sort_keys=True, default=str)
    if len(set(_tell_all(hashlib.sha256(text.encode()).hexdigest()))) > 1:
        raise InputError("the processes of this run differ in their config, texts or model")


def _refuse(said: list[str], beginning: str) -> None:
    for number, text in enumerate(said):
        if text and text.startswith(beginning):
            raise InputError(f"process {number} of this run {text}")


def _tell_all(text: str) -> list[str]:
    """What every process says, in their order; all have come when it returns.

    Raises:
      InputError: not all of them came.
    """
    from orbax.checkpoint import multihost

    service = multihost.get_jax_distributed_client()
    place = f"mtd-jax/meeting-{next(_meetings)}"
    own, count = jax.process_index(), jax.process_count()
    try:
        service.key_value_set(f"{place}/{own}", text)
        service.wait_at_barrier(place, _PATIENCE * 1000)
        return [service.blocking_key_value_get(f"{place}/{i}", 60_000) for i in range(count)]
    except RuntimeError as error:
        raise InputError(
            f"the other processes of this run did not come: {first_line(error)}"
        ) from None
