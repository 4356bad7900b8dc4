"""Compiled programs are forgotten before the process has too many memory maps."""

from __future__ import annotations

from pathlib import Path

import jax
import pytest

from mtd_jax import backend, generate, methods
from mtd_jax.decoding.clock import Clock
from tests.support import tiny


def _maps() -> int:
    return Path("/proc/self/maps").read_bytes().count(b"\n")


def test_nothing_is_forgotten_far_from_the_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backend, "_MAPS_SHARE", 0.999)
    assert not backend.release_programs()


def test_programs_are_forgotten_and_made_again(monkeypatch: pytest.MonkeyPatch) -> None:
    model, method = tiny.language_model(), methods.autoregressive()

    def answer() -> tuple[int, ...]:
        return generate(model, method, [[3, 4, 5]], max_new_tokens=5)[0].token_ids

    first = answer()
    monkeypatch.setattr(backend, "_MAPS_SHARE", 0.0)
    before = _maps()
    assert backend.release_programs()
    assert _maps() < before
    with Clock() as clock:
        assert answer() == first
    assert clock.compilations > 0
    assert jax.default_backend() == "cpu"
