"""libtpu is left alone where there is no TPU, and nowhere else."""

from __future__ import annotations

import importlib.metadata
import importlib.util
from typing import Any

import jax
import pytest

from mtd_jax import backend


@pytest.mark.parametrize(
    ("changes", "set_to_cpu"),
    [
        ({}, True),
        ({"chips": True}, False),
        ({"libtpu": False}, False),
        ({"plugins": ["cuda12"]}, False),
        ({"asked": "tpu,cpu"}, False),
    ],
    ids=lambda value: str(value),
)
def test_when_libtpu_is_left_alone(
    monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any], set_to_cpu: bool
) -> None:
    machine = {"chips": False, "libtpu": True, "plugins": [], "asked": "", **changes}
    updates: list[tuple[str, str]] = []
    monkeypatch.setenv("JAX_PLATFORMS", machine["asked"])
    monkeypatch.setattr(backend, "has_tpu", lambda: machine["chips"])
    found = object() if machine["libtpu"] else None
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: found)
    monkeypatch.setattr(importlib.metadata, "entry_points", lambda group: machine["plugins"])
    monkeypatch.setattr(jax.config, "update", lambda *words: updates.append(words))
    backend.leave_libtpu_alone()
    assert updates == ([("jax_platforms", "cpu")] if set_to_cpu else [])
