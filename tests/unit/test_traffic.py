"""Bytes that a step reads bound what a method can gain."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import pytest

from mtd_jax import methods
from mtd_jax.config import read_shape
from mtd_jax.decoding.traffic import weight_bytes
from mtd_jax.transformer.model import declare
from tests.support.command_line import ROOT


@pytest.mark.parametrize(
    ("cycle", "bound"), [(2, "1.41x"), (3, "1.63x"), (4, "1.77x"), (6, "1.93x")]
)
def test_bounds_of_cycles_are_those_of_the_shape(cycle: int, bound: str) -> None:
    declared = declare(read_shape(ROOT / "configs/models/smollm2-135m.toml"))
    params = jax.tree.map(lambda w: jax.ShapeDtypeStruct(w.shape, jnp.float32), declared)
    whole, part = weight_bytes(params), methods.dmtd(cycle=cycle).partial_bytes(params, 0.0)
    assert f"{cycle * whole / (whole + (cycle - 1) * part):.2f}x" == bound
    assert bound in (ROOT / "docs/dmtd.md").read_text("utf-8")
