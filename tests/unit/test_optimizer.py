"""Schedules at their corners, what decays, how much work a token is."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mtd_jax.training import utilization
from mtd_jax.training.config import OptimizerConfig
from mtd_jax.training.objective import FineTuning, reaches_layers
from mtd_jax.training.optimizer import make_optimizer, make_schedule
from tests.support import tiny

# Learning rates after 0, 4, 5, 9, 10, 14, 15 and 20 of 20 steps, of a peak of 1.
EXPECTED: dict[str, list[float]] = {
    "constant": [0.2, 1, 1, 1, 1, 1, 1, 1],
    "linear": [0.2, 1, 1, 0.76, 0.7, 0.46, 0.4, 0.1],
    "wsd": [0.2, 1, 1, 1, 1, 1, 1, 0.1],
}


@pytest.mark.parametrize("name", EXPECTED)
def test_schedules(name: Any) -> None:
    config = OptimizerConfig(
        steps=20, learning_rate=1.0, schedule=name, warmup=0.25, decay=0.25, final=0.1
    )
    with jax.numpy_dtype_promotion("standard"):
        schedule = make_schedule(config)
        found = [float(schedule(s)) for s in (0, 4, 5, 9, 10, 14, 15, 20)]
    np.testing.assert_allclose(found, EXPECTED[name], rtol=1e-5)


def test_cosine_ends_where_it_should() -> None:
    config = OptimizerConfig(steps=20, learning_rate=2.0, warmup=0.0, final=0.25)
    with jax.numpy_dtype_promotion("standard"):
        schedule = make_schedule(config)
        assert float(schedule(0)) == 2.0
        np.testing.assert_allclose(float(schedule(10)), (2.0 + 0.5) / 2, rtol=1e-5)
        np.testing.assert_allclose(float(schedule(20)), 0.5, rtol=1e-5)


def test_matrices_decay_and_vectors_do_not() -> None:
    params = tiny.params(tiny.config(qkv_bias=True, qk_norm=True))
    params = jax.tree.map(jnp.ones_like, params)
    optimizer = make_optimizer(
        OptimizerConfig(
            steps=1, learning_rate=1.0, warmup=0.0, weight_decay=0.5, schedule="constant"
        )
    )
    nothing = jax.tree.map(jnp.zeros_like, params)
    with jax.numpy_dtype_promotion("standard"):
        updates, _ = optimizer.update(nothing, optimizer.init(params), params)
    paths = jax.tree_util.tree_leaves_with_path(updates)
    moved = {jax.tree_util.keystr(p, simple=True, separator=".") for p, u in paths if u.any()}
    weights = {"qkv", "attention_out", "gate_up", "down"}
    assert moved == {"embedding", "head", *(f"blocks.{name}" for name in weights)}


def test_flops_of_a_model_counted_by_hand() -> None:
    params = tiny.params()
    # qkv 32 x (4 + 2 * 2) * 8, out 32 x 32, MLP 3 x 32 x 48, in 3 layers; the head 32 x 97.
    products = 3 * (32 * 64 + 32 * 32 + 3 * 32 * 48) + 32 * 97
    assert utilization.weights_in_products(params) == products
    trainable, frozen = FineTuning().split(params)
    assert FineTuning().flops(trainable, frozen) == 6 * products
    head_only = FineTuning(freeze=("embedding", "blocks", "final_norm"))
    # Below the only trained weight no gradient is made, of rows neither.
    assert head_only.flops(*head_only.split(params)) == 2 * products + 2 * 32 * 97
    with_norm = FineTuning(freeze=("embedding", "blocks"))
    assert with_norm.flops(*with_norm.split(params)) == 2 * products + 4 * 32 * 97
    down = FineTuning(freeze=("embedding", "blocks.qkv", "head"))
    trained = products - 3 * 32 * 64 - 32 * 97
    assert down.flops(*down.split(params)) == 4 * products + 2 * trained
    assert [reaches_layers(o.split(params)[0]) for o in (head_only, with_norm, down)] == [
        False,
        False,
        True,
    ]
    assert utilization.attention_flops(params.config, 10.0, backward=False) == 4 * 3 * 4 * 8 * 10
    assert utilization.attention_flops(params.config, 10.0) == 12 * 3 * 4 * 8 * 10


def test_keys_seen() -> None:
    """Documents of 3 and 1 tokens: 1 + 2 + 3 and 1 keys, over 4 tokens."""
    plain, windows = tiny.config(), tiny.config(sliding_windows=(None, 2, 2))
    assert utilization.keys_seen(plain, np.array([[1, 1, 1, 2, 0]])) == 7 / 4
    assert utilization.keys_seen(windows, np.array([[1, 1, 1, 1, 0]])) == (10 + 7 + 7) / 4 / 3
    assert utilization.keys_seen(plain, np.zeros((1, 4), np.int32)) == 0


def test_peaks() -> None:
    assert utilization.peak_of("TPU v5 lite") == 197e12
    assert utilization.peak_of("TPU v5p") == 459e12
    assert utilization.peak_of("NVIDIA H200") == 989e12
    assert utilization.peak_of("NVIDIA H100 80GB HBM3") == 989e12
    assert utilization.peak_of("NVIDIA H100 PCIe") == 756e12
    assert utilization.peak_of("cpu") is None
    assert utilization.peak_flops(jax.devices()[0]) > 1e8
