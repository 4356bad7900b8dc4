"""The meshes of the tests: each axis alone, and mixtures of them, over the simulated devices."""

from __future__ import annotations

MESHES = (
    "data=8",
    "fsdp=8",
    "tensor=8",
    "data=2,tensor=4",
    "data=2,fsdp=2,tensor=2",
    "fsdp=4,tensor=2",
    "tensor=2",
)
