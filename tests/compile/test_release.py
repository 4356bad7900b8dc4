"""Compiled programs are forgotten before the process has too many memory maps."""

from __future__ import annotations

from pathlib import Path

import jax

from mtd_jax import backend, generate, methods
from mtd_jax.decoding.clock import Clock
from tests.support import tiny


def _maps() -> int:
    return Path("/proc/self/maps").read_bytes().count(b"\n")


def test_nothing_is_forgotten_far_from_the_limit() -> None:
    assert not backend.release_programs(share=0.999)


def test_programs_are_forgotten_and_made_again() -> None:
    model, method = tiny.language_model(), methods.autoregressive()

    def answer() -> tuple[int, ...]:
        return generate(model, method, [[3, 4, 5]], max_new_tokens=5)[0].token_ids

    first = answer()
    before = _maps()
    assert backend.release_programs(share=0.0)
    assert _maps() < before
    with Clock() as clock:
        assert answer() == first
    assert clock.compilations > 0
    assert jax.default_backend() == "cpu"
