"""What conftest.py and pyproject.toml promise about the session is so."""

import importlib
import os

import hypothesis
import jax
import jax.numpy as jnp
import pytest


def test_eight_devices() -> None:
    if jax.default_backend() == "cpu":
        assert jax.device_count() == 8
    assert "--xla_force_host_platform_device_count=8" in os.environ["XLA_FLAGS"]


def test_a_missing_axis_does_not_broadcast() -> None:
    with pytest.raises(ValueError, match="jax_numpy_rank_promotion"):
        _ = jnp.ones((2, 3)) + jnp.ones(3)


def test_types_do_not_promote() -> None:
    with pytest.raises(Exception, match="jax_numpy_dtype_promotion"):
        _ = jnp.ones(2, jnp.float32) + jnp.ones(2, jnp.int32)


def test_annotations_are_checked() -> None:
    """Every module of the package is loaded through jaxtyping's import hook."""
    for name in ("mtd_jax", "mtd_jax.config", "mtd_jax.transformer.rope"):
        loader = importlib.import_module(name).__loader__
        assert "jaxtyping" in type(loader).__module__, f"{name} is loaded by {loader}"


def test_a_wrong_shape_raises() -> None:
    from mtd_jax.transformer.rope import apply_rotary

    x, half, wrong = jnp.ones((1, 2, 1, 4)), jnp.ones((1, 2, 2)), jnp.ones((1, 3, 2))
    assert apply_rotary(x, half, half).shape == x.shape
    with pytest.raises(Exception, match="Type-check error"):
        apply_rotary(x, half, wrong)


def test_examples_repeat() -> None:
    assert hypothesis.settings.default is not None
    assert hypothesis.settings.default.derandomize
    assert hypothesis.settings.default.deadline is None
