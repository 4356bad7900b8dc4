"""Reading prompts: a batch is no more than its prompts one by one."""

from __future__ import annotations

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mtd_jax import backend
from mtd_jax.decoding.prompt import bucket_prompt, read_prompt
from tests.support import tiny

LENGTHS = (70, 3, 150, 64)


def _prompts() -> list[np.ndarray]:
    draw = np.random.default_rng(0)
    return [draw.integers(3, 97, n).astype(np.int32) for n in LENGTHS]


def _read(prompts: list[np.ndarray]) -> tuple[np.ndarray, list[tuple[np.ndarray, np.ndarray]]]:
    """The last outputs [B, D], and each row's keys and values as far as its prompt goes."""
    padded = bucket_prompt(max(map(len, prompts)))
    tokens = np.zeros((len(prompts), padded), np.int32)
    for i, ids in enumerate(prompts):
        tokens[i, : len(ids)] = ids
    lengths = jnp.asarray([len(ids) for ids in prompts], jnp.int32)
    read = jax.jit(read_prompt, static_argnums=3)
    last, cache = read(tiny.params(), jnp.asarray(tokens), lengths, 256)
    assert cache.length.tolist() == [len(ids) for ids in prompts]
    kept = [
        (np.asarray(cache.k[:, i, ..., :n]), np.asarray(cache.v[:, i, :, :n]))
        for i, n in enumerate(map(len, prompts))
    ]
    return np.asarray(last), kept


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="others read a batch side by side")
def test_nothing_is_computed_for_a_longer_neighbour() -> None:
    """The rows that pass the layers are one prompt's, 64 at a time, whatever the batch."""
    lengths = jnp.asarray(LENGTHS, jnp.int32)
    lowered = jax.jit(read_prompt, static_argnums=3).lower(
        tiny.params(), jnp.zeros((4, 256), jnp.int32), lengths, 256
    )
    width = tiny.CONFIG.hidden_size
    rows = set(re.findall(rf"tensor<(\d+x\d+)x{width}xf32>", lowered.as_text()))
    assert "1x64" in rows
    assert not {f"{b}x{t}" for b in (1, 4) for t in (64, 256)} & rows - {"1x64"}


@pytest.mark.parametrize("index", range(len(LENGTHS)))
def test_a_prompt_in_a_batch_is_read_as_if_alone(index: int) -> None:
    last, kept = _read(_prompts())
    alone, ((k, v),) = _read([_prompts()[index]])
    np.testing.assert_allclose(last[index], alone[0], rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(kept[index][0], k, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(kept[index][1], v, rtol=1e-4, atol=1e-4)


def test_side_by_side_is_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    """As accelerators and meshes read, which another CPU program stands in for."""
    last, kept = _read(_prompts())
    monkeypatch.setattr(backend, "reads_prompts_alone", lambda: False)
    together, beside = _read(_prompts())
    np.testing.assert_allclose(last, together, rtol=1e-4, atol=1e-4)
    for a, b in zip(kept, beside, strict=True):
        np.testing.assert_allclose(a[0], b[0], rtol=1e-4, atol=1e-4)
        np.testing.assert_allclose(a[1], b[1], rtol=1e-4, atol=1e-4)
