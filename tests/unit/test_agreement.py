"""Processes that refuse together: the service and the others are played by the test."""

from __future__ import annotations

from collections.abc import Callable

import jax
import pytest

from mtd_jax.errors import InputError
from mtd_jax.training import agreement
from mtd_jax.training.agreement import check_same_everywhere, refused_together


class Service:
    """Keys and values; the second of two processes answers what the first said at every meeting.

    Each time it is asked in vain once, as if the second came a second later.
    """

    def __init__(self) -> None:
        self.told: dict[str, str] = {}
        self.says: Callable[[str], str] = lambda first: ""
        self.asked: set[str] = set()
        self.broken = ""

    def key_value_set(self, key: str, value: str) -> None:
        assert key not in self.told
        self.told[key] = value

    def blocking_key_value_get(self, key: str, milliseconds: int) -> str:
        assert milliseconds <= 1000
        if self.broken:
            raise RuntimeError(self.broken)
        meeting, _, index = key.rpartition("/")
        if index == "1" and key not in self.asked:
            self.asked.add(key)
            raise RuntimeError("DEADLINE_EXCEEDED: GetKeyValue() timed out")
        return self.told[key] if index == "0" else self.says(self.told[f"{meeting}/0"])


@pytest.fixture
def service(monkeypatch: pytest.MonkeyPatch) -> Service:
    found = Service()
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    monkeypatch.setattr(agreement, "_service", lambda: found)
    return found


def test_what_one_refuses_the_others_are_told(service: Service) -> None:
    """Files that cannot be read count as refusals; what was wrong here is said here."""
    service.says = lambda first: "refused: no prompts here"
    with pytest.raises(InputError, match="process 1 of this run refused: no prompts here"):
        with refused_together():
            pass
    for error in (InputError("broken"), PermissionError("locked"), ZeroDivisionError("a fault")):
        with pytest.raises(type(error), match=str(error)), refused_together():
            raise error
    told = ["", "refused: broken", "refused: locked", "failed: a fault"]
    assert list(service.told.values()) == told


def test_who_is_interrupted_waits_for_nobody(service: Service) -> None:
    with pytest.raises(KeyboardInterrupt), refused_together():
        raise KeyboardInterrupt
    assert list(service.told.values()) == ["was interrupted"]
    assert not service.asked


def test_a_service_that_breaks_is_one_line(service: Service) -> None:
    service.broken = "UNAVAILABLE: connection refused\nand more"
    with pytest.raises(InputError, match=r"did not come: UNAVAILABLE: connection refused$"):
        with refused_together():
            pass
    with pytest.raises(InputError, match=r"^mine$"), refused_together():
        raise InputError("mine")


def test_processes_that_were_started_differently(service: Service) -> None:
    service.says = lambda first: first
    check_same_everywhere({"seed": 1})
    service.says = lambda first: first[::-1]
    with pytest.raises(InputError, match="differ in their config, texts or model"):
        check_same_everywhere({"seed": 1})
    one, other = service.told.values()
    assert one == other
