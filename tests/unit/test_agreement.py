"""Processes that refuse together, with the others played by the test."""

import jax
import pytest

from mtd_jax.errors import InputError
from mtd_jax.training.agreement import check_same_everywhere, refused_together


class Others:
    """A second process that says the same thing at every meeting; this one is the first."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, says: str) -> None:
        self.told: list[str] = []
        self.says = says
        monkeypatch.setattr(jax, "process_count", lambda: 2)
        monkeypatch.setattr("mtd_jax.training.agreement._tell_all", self.meet)

    def meet(self, text: str) -> list[str]:
        self.told.append(text)
        return [text, self.says]


def test_what_one_refuses_the_others_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    """Files that cannot be read count as refusals; what was wrong here is said here."""
    others = Others(monkeypatch, "refused: no prompts here")
    with pytest.raises(InputError, match="process 1 of this run refused: no prompts here"):
        with refused_together():
            pass
    for error in (InputError("broken"), PermissionError("locked")):
        with pytest.raises(type(error), match=str(error)), refused_together():
            raise error
    assert others.told == ["", "refused: broken", "refused: locked"]


def test_what_fails_because_another_refused_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    others = Others(monkeypatch, "refused: no weights here")
    with pytest.raises(InputError, match="process 1 of this run refused: no weights here"):
        with refused_together():
            raise RuntimeError("connection closed by peer")
    others.says = "failed: connection closed by peer"
    with pytest.raises(ZeroDivisionError), refused_together():
        raise ZeroDivisionError("a fault of the program")
    with pytest.raises(InputError, match="process 1 of this run failed: connection closed"):
        with refused_together():
            pass
    assert others.told[1] == "failed: a fault of the program"


def test_processes_that_were_started_differently(monkeypatch: pytest.MonkeyPatch) -> None:
    others = Others(monkeypatch, "")
    with pytest.raises(InputError, match="differ in their config, texts or model"):
        check_same_everywhere({"seed": 1})
    others.says = others.told[0]
    check_same_everywhere({"seed": 1})
    with pytest.raises(InputError, match="differ"):
        check_same_everywhere({"seed": 2})
