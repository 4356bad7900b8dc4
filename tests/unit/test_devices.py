"""How processes find each other, and which rows each of them brings."""

from __future__ import annotations

import glob
import importlib.util
from typing import Any

import jax
import pytest

from mtd_jax.errors import InputError
from mtd_jax.training.config import MeshConfig
from mtd_jax.training.devices import (
    Processes,
    share_of_rows,
    training_mesh,
)

_SLURM = {"SLURM_STEP_ID": "0", "SLURM_NTASKS": "4"}


@pytest.mark.parametrize(
    ("variables", "chips", "connects"),
    [
        ({}, False, False),
        ({"JAX_COORDINATOR_ADDRESS": "host:1"}, False, True),
        (_SLURM, False, True),
        ({**_SLURM, "SLURM_NTASKS": "1"}, False, False),
        ({}, True, True),
        ({"JAX_PLATFORMS": "cpu"}, True, False),
    ],
)
def test_when_others_are_looked_for(
    monkeypatch: pytest.MonkeyPatch, variables: dict[str, str], chips: bool, connects: bool
) -> None:
    calls: list[Any] = []
    for name in ("JAX_COORDINATOR_ADDRESS", "SLURM_STEP_ID", "SLURM_NTASKS", "JAX_PLATFORMS"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(glob, "glob", lambda name: ["/dev/accel0"] if chips else [])
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object() if chips else None)
    monkeypatch.setattr(jax.distributed, "initialize", lambda *a, **k: calls.append(a))
    Processes().join()
    assert len(calls) == connects


def test_slices_are_the_outermost_part_of_the_batch() -> None:
    mesh = training_mesh(MeshConfig(slices=2, fsdp=4))
    assert dict(mesh.shape) == {"data": 2, "fsdp": 4, "tensor": 1}
    ids = [d.id for d in mesh.devices.ravel()]
    assert ids == sorted(ids)
    with pytest.raises(InputError, match="does not divide 8 devices"):
        training_mesh(MeshConfig(slices=3))


def test_shares_of_rows() -> None:
    mesh = training_mesh(MeshConfig(data=2, fsdp=2))
    assert mesh.size == 4  # fewer than there are, because it says so
    assert share_of_rows(mesh, 8, 2) == (0, 1)
    with pytest.raises(InputError, match="in 2 parts does not spread over data x fsdp = 4"):
        share_of_rows(mesh, 12, 2)
