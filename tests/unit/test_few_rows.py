"""Few rows: products against numpy, attention against XLA's, and what is done without a kernel."""

from __future__ import annotations

import concurrent.futures
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType

from mtd_jax.kernels import few_rows, library
from mtd_jax.transformer.attention import attend, attend_cached
from mtd_jax.transformer.cache import KVCache
from mtd_jax.transformer.linear import contract

SHAPES = [(1, 576, 960), (3, 8, 7), (5, 13, 33), (16, 100, 257), (2, 1, 1), (7, 64, 9001)]


@pytest.fixture(autouse=True)
def _there() -> None:
    assert few_rows.takes(1, jnp.float32), "a C++ compiler belongs to these tests"


def _drawn(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape, np.float32)


@pytest.mark.parametrize(("rows", "depth", "width"), SHAPES)
def test_is_the_product(rows: int, depth: int, width: int) -> None:
    x, weight = _drawn(rows, depth), _drawn(depth, width, seed=1)
    exact = x.astype(np.float64) @ weight
    scale = np.abs(x).astype(np.float64) @ np.abs(weight)
    found = jax.jit(few_rows.product)(x, weight)
    assert np.max(np.abs(found - exact) / scale) < 1e-6


@pytest.mark.parametrize(("rows", "depth", "width"), SHAPES)
def test_a_row_does_not_depend_on_the_others(rows: int, depth: int, width: int) -> None:
    x, weight = _drawn(rows, depth), _drawn(depth, width, seed=1)
    together = np.asarray(few_rows.product(jnp.asarray(x), jnp.asarray(weight)))
    alone = [few_rows.product(jnp.asarray(row[None]), jnp.asarray(weight)) for row in x]
    np.testing.assert_array_equal(together, np.concatenate(alone))


def test_what_is_not_finite_stays_in_its_row() -> None:
    x = _drawn(4, 64)
    x[1], x[2, 3] = np.nan, np.inf
    found = np.asarray(few_rows.product(jnp.asarray(x), jnp.ones((64, 40))))
    assert np.isfinite(found[[0, 3]]).all()
    assert np.isnan(found[1]).all()
    assert np.isinf(found[2]).all()


def test_no_rows_and_no_columns() -> None:
    for x, weight in (
        (jnp.zeros((0, 4)), jnp.zeros((4, 5))),
        (jnp.zeros((2, 4)), jnp.zeros((4, 0))),
    ):
        assert few_rows.product(x, weight).shape == (x.shape[0], weight.shape[1])


def test_products_that_run_at_once_do_not_wait_for_each_other() -> None:
    """Each takes helpers of one pool of threads; none may wait for one that has not begun."""
    weight = jnp.asarray(_drawn(512, 1024))
    product = jax.jit(few_rows.product)
    rows = [jnp.asarray(_drawn(8, 512, seed=seed)) for seed in range(16)]
    with concurrent.futures.ThreadPoolExecutor(16) as pool:
        found = list(pool.map(lambda x: np.asarray(product(x, weight)), rows * 8))
    for x, y in zip(rows * 8, found, strict=True):
        np.testing.assert_array_equal(y, product(x, weight))


# B, T, K, G, H, S, L
ATTENDED = [
    (1, 1, 3, 3, 64, 128, 2),
    (2, 8, 3, 3, 64, 256, 3),
    (3, 16, 2, 4, 16, 128, 1),
    (1, 5, 1, 1, 24, 96, 2),
    (1, 3, 3, 1, 80, 1024, 2),
]


def _attended(
    batch: int, rows: int, heads: int, group: int, depth: int, slots: int, layers: int
) -> tuple[jax.Array, ...]:
    """Rows that see 40 % of the slots of the last layer, none of those at the end."""
    q = _drawn(batch, rows, heads, group, depth)
    k = _drawn(layers, batch, heads, depth, slots, seed=1)
    v = _drawn(layers, batch, heads, slots, depth, seed=2)
    mask = np.random.default_rng(3).random((batch, rows, slots)) < 0.4
    mask[..., -37:] = False
    mask[..., 0] = True
    return tuple(map(jnp.asarray, (q, k, v, np.int32(layers - 1), mask)))


@pytest.mark.parametrize("shape", ATTENDED, ids=str)
def test_attention_is_that_of_the_plain_expression(shape: tuple[int, ...]) -> None:
    q, k, v, layer, mask = _attended(*shape)
    assert few_rows.attends(q, k, v)
    cache = KVCache(k, v, jnp.zeros(len(q), jnp.int32))
    found = jax.jit(attend_cached)(q, cache, layer, mask)
    with few_rows.left_out():
        known = jax.jit(lambda *x: attend_cached(*x))(q, cache, layer, mask)
    np.testing.assert_allclose(found, known, atol=2e-6)
    np.testing.assert_allclose(known, attend(q, k[-1], v[-1], mask), atol=1e-6)


@pytest.mark.parametrize("shape", ATTENDED, ids=str)
def test_attention_of_a_row_does_not_depend_on_the_others(shape: tuple[int, ...]) -> None:
    q, k, v, layer, mask = _attended(*shape)
    together = few_rows.attend(q, k, v, layer, mask)
    for t in range(q.shape[1]):
        alone = few_rows.attend(q[:, t : t + 1], k, v, layer, mask[:, t : t + 1])
        np.testing.assert_array_equal(together[:, t : t + 1], alone)


def test_rows_that_see_nothing_are_zeros_and_large_scores_stay_finite() -> None:
    q, k, v, layer, mask = _attended(1, 2, 1, 1, 16, 128, 1)
    found = few_rows.attend(1e4 * q, k, v, layer, mask.at[0, 0].set(False))
    np.testing.assert_array_equal(found[0, 0], 0)
    assert np.isfinite(found).all()
    assert np.abs(found[0, 1]).max() > 0


def test_what_lies_behind_all_that_is_seen_is_not_read() -> None:
    """A cache's slots behind the text hold what rejected drafts left there."""
    q, k, v, layer, mask = _attended(1, 4, 2, 2, 16, 256, 1)
    mask = mask.at[..., 100:].set(False)
    found = few_rows.attend(q, k, v, layer, mask)
    spoiled = few_rows.attend(
        q, k.at[..., 128:].set(jnp.nan), v.at[..., 128:, :].set(jnp.nan), layer, mask
    )
    np.testing.assert_array_equal(found, spoiled)


def test_attention_that_xla_keeps() -> None:
    q, k, v, *_ = _attended(1, 4, 2, 2, 16, 128, 1)
    assert not few_rows.attends(q, k[..., :100], v)  # slots in part of a tile
    assert not few_rows.attends(jnp.tile(q, (1, 1, 1, 20, 1)), k, v)  # too many queries
    assert not few_rows.attends(jnp.tile(q, (1, 8, 1, 1, 1)), k, v)  # too many rows
    assert not few_rows.attends(q.astype(jnp.bfloat16), k, v)


def test_gradients_of_attention_are_those_of_the_plain_expression() -> None:
    q, k, v, layer, mask = _attended(1, 3, 2, 2, 16, 128, 2)

    def total(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
        cache = KVCache(k, v, jnp.zeros(len(q), jnp.int32))
        return jnp.sum(jnp.sin(attend_cached(q, cache, layer, mask)))

    def gradients(*arrays: jax.Array) -> tuple[jax.Array, ...]:
        return jax.grad(lambda *x: total(*x), (0, 1, 2))(*arrays)

    found = gradients(q, k, v)
    with few_rows.left_out():
        known = gradients(q, k, v)
    for ours, theirs in zip(found, known, strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-5)


def test_gradients_are_those_of_a_matrix_product() -> None:
    x, weight = jnp.asarray(_drawn(3, 24)), jnp.asarray(_drawn(24, 40, seed=1))

    def gradients(product: Callable[..., jax.Array]) -> tuple[jax.Array, jax.Array]:
        return jax.grad(lambda x, w: jnp.sum(jnp.sin(product(x, w))), argnums=(0, 1))(x, weight)

    found, known = gradients(few_rows.product), gradients(jnp.matmul)
    for ours, theirs in zip(found, known, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("equation", "x", "weight", "kernel"),
    [
        ("BTD,DKJH->BTKJH", (2, 3, 8), (8, 2, 3, 4), True),
        ("BTI,ID->BTD", (2, 3, 8), (8, 5), True),
        ("...D,DV->...V", (3, 8), (8, 5), True),
        ("...D,DV->...V", (17, 8), (8, 5), False),
        ("...D,VD->...V", (3, 8), (5, 8), False),
        ("...rnk,rnkD->...rnD", (3, 2, 2, 8), (2, 2, 8, 5), False),
    ],
)
def test_contractions_take_it_where_they_are_products_of_few_rows(
    equation: str, x: tuple[int, ...], weight: tuple[int, ...], kernel: bool
) -> None:
    rows, matrix = jnp.asarray(_drawn(*x)), jnp.asarray(_drawn(*weight, seed=1))
    program = jax.jit(lambda x, weight: contract(equation, x, weight)).lower(rows, matrix)
    assert ("mtd_few_rows" in program.as_text()) == kernel
    found = contract(equation, rows, matrix)
    np.testing.assert_allclose(found, jnp.einsum(equation, rows, matrix), rtol=1e-5, atol=1e-5)


def test_other_dtypes_and_meshes_are_left_to_xla() -> None:
    assert not few_rows.takes(4, jnp.float32, jnp.bfloat16)
    assert not few_rows.takes(few_rows.MOST_ROWS + 1, jnp.float32)
    mesh = jax.make_mesh((2,), ("data",), axis_types=(AxisType.Auto,))
    with jax.set_mesh(mesh):
        assert not few_rows.takes(4, jnp.float32)


def _in_a_process(program: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", program],
        env=os.environ | environment,
        capture_output=True,
        text=True,
        check=True,
        timeout=120,
    )


SAYS = "from mtd_jax.kernels import library; print(library.about())"


def test_it_can_be_switched_off() -> None:
    assert _in_a_process(SAYS, MTD_KERNELS="0").stdout == "xla\n"


def test_without_a_compiler_xla_multiplies_in_silence(tmp_path: Path) -> None:
    done = _in_a_process(SAYS, PATH=str(tmp_path), CXX="")
    assert (done.stdout, "not compiled" in done.stderr) == ("xla\n", False)


@pytest.mark.parametrize("fault", ["compiler", "directory"])
def test_a_compiler_that_fails_is_one_warning(tmp_path: Path, fault: str) -> None:
    compiler = tmp_path / "c++"
    compiler.write_text("#!/bin/sh\necho 'fatal: no such thing' >&2\nexit 1\n")
    compiler.chmod(0o755)
    cache = tmp_path / "cache"
    if fault == "directory":
        cache.write_text("a file")
    done = _in_a_process(SAYS, CXX=str(compiler), MTD_CACHE_DIR=str(cache))
    assert done.stdout == "xla\n"
    assert "few_rows.cc was not compiled (" in done.stderr
    assert ("no such thing" in done.stderr) == (fault == "compiler")
    assert fault == "directory" or not list((cache / "kernels").iterdir())


def test_it_is_compiled_once(tmp_path: Path) -> None:
    for _ in range(2):
        assert _in_a_process(SAYS, MTD_CACHE_DIR=str(tmp_path)).stdout.startswith("few_rows (")
        (built,) = (tmp_path / "kernels").iterdir()
        seen = built.stat().st_mtime_ns
    assert built.stat().st_mtime_ns == seen
    assert library.SOURCE.suffix == ".cc"
