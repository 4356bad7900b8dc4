"""Chunked losses equal the plain ones, and never hold more than a chunk of logits."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mtd_jax.transformer.losses import cross_entropy, divergences
from mtd_jax.transformer.model import Parameters, project, unembed
from mtd_jax.transformer.packed import shifted
from tests.support import tiny

LENGTH = 13
CONFIGS: dict[str, dict[str, Any]] = {
    "tied": {"tie_embeddings": True},
    "untied": {},
    "capped": {"final_logit_softcap": 2.0},
}


def _data(seed: int = 0) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """Rows, another model's rows, targets, which of them count."""
    keys = jax.random.split(jax.random.key(seed), 4)
    x, teacher = (jax.random.normal(k, (2, LENGTH, 32)) for k in keys[:2])
    targets = jax.random.randint(keys[2], (2, LENGTH), 0, 97)
    return x, teacher, targets, jax.random.bernoulli(keys[3], 0.6, (2, LENGTH))


def _plain_cross_entropy(params: Parameters, x: jax.Array) -> jax.Array:
    _, _, targets, counts = _data()
    log_p = jax.nn.log_softmax(unembed(params, x))
    own = jnp.take_along_axis(log_p, targets[..., None], axis=-1)[..., 0]
    return -jnp.where(counts, own, 0.0).sum()


def _students() -> tuple[jax.Array, jax.Array]:
    """Three for every position, and what each counts for where it has a teacher."""
    keys = jax.random.split(jax.random.key(5), 3)
    shares = jax.random.uniform(keys[1], (2, LENGTH, 3))
    counts = jax.random.bernoulli(keys[2], 0.6, (2, LENGTH, 3))
    places = jnp.arange(LENGTH)[None, :, None] + jnp.arange(1, 4)[None, None, :]
    shares = jnp.where(counts & (places < LENGTH), shares, 0.0)
    return jax.random.normal(keys[0], (2, LENGTH, 3, 32)), shares


def _plain_divergences(
    base: Parameters, readers: tuple[Parameters, ...], students: jax.Array
) -> jax.Array:
    _, teacher, _, _ = _data()
    whole = jax.nn.log_softmax(project(jax.lax.stop_gradient(base), teacher))
    loss = jnp.float32(0)
    for i, reader in enumerate(readers or (base,) * 3):
        log_p = shifted(whole, i + 1)
        log_q = jax.nn.log_softmax(project(reader, students[:, :, i]))
        kl = (jnp.exp(log_p) * (log_p - log_q)).sum(axis=-1)
        loss += (_students()[1][..., i] * kl).sum()
    return loss


@pytest.mark.parametrize("chunk", [1, 4, 13, 100])
@pytest.mark.parametrize("name", CONFIGS)
def test_values_and_gradients_are_those_of_whole_logits(name: str, chunk: int) -> None:
    params = tiny.params(tiny.config(**CONFIGS[name]))
    x, _, targets, counts = _data()

    def chunked_ce(params: Parameters, x: jax.Array) -> jax.Array:
        return cross_entropy(params, x, targets, counts, chunk=chunk)["loss"]

    got = jax.jit(jax.value_and_grad(chunked_ce, argnums=(0, 1)))(params, x)
    want = jax.value_and_grad(_plain_cross_entropy, argnums=(0, 1))(params, x)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), got, want)


@pytest.mark.parametrize("own", [False, True], ids=["shared", "own"])
@pytest.mark.parametrize("chunk", [1, 4, 13, 100])
@pytest.mark.parametrize("name", CONFIGS)
def test_divergences_are_those_of_whole_logits(name: str, chunk: int, own: bool) -> None:
    config = tiny.config(**CONFIGS[name])
    base, (students, shares), (_, teacher, _, _) = tiny.params(config), _students(), _data()
    readers = tuple(tiny.params(config, seed=i) for i in (1, 2, 3)) if own else ()

    def chunked(
        base: Parameters, readers: tuple[Parameters, ...], students: jax.Array
    ) -> jax.Array:
        return divergences(base, teacher, students, shares, chunk=chunk, readers=readers)[0]

    got = jax.jit(jax.value_and_grad(chunked, argnums=(0, 1, 2)))(base, readers, students)
    want = jax.value_and_grad(_plain_divergences, argnums=(0, 1, 2))(base, readers, students)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), got, want)


def test_right_guesses_are_counted() -> None:
    params = tiny.params()
    x, teacher, targets, counts = _data()
    best = jnp.argmax(unembed(params, x), axis=-1)
    found = cross_entropy(params, x, best, counts, chunk=5)["right"]
    assert int(found) == int(counts.sum())
    other = jnp.where(targets == best, (best + 1) % 97, targets)
    assert int(cross_entropy(params, x, other, counts, chunk=5)["right"]) == 0
    students, shares = _students()
    best = jnp.argmax(project(params, teacher), axis=-1)
    best = jnp.stack([shifted(best, i + 1) for i in range(3)], axis=2)
    agreeing = jnp.argmax(project(params, students), axis=-1) == best
    right = divergences(params, teacher, students, shares, chunk=5)[1]
    np.testing.assert_array_equal(right, (agreeing & (shares > 0)).sum((0, 1)))
    itself = jnp.stack([shifted(teacher, i + 1) for i in range(3)], axis=2)
    right = divergences(params, teacher, itself, shares, chunk=5)[1]
    np.testing.assert_array_equal(right, (shares > 0).sum((0, 1)))


def test_the_gradient_can_be_scaled() -> None:
    params = tiny.params()
    x, _, targets, counts = _data()

    def loss(x: jax.Array, scale: float) -> jax.Array:
        return scale * cross_entropy(params, x, targets, counts, chunk=4)["loss"]

    np.testing.assert_allclose(
        jax.grad(loss)(x, -3.0), -3.0 * jax.grad(loss)(x, 1.0), rtol=1e-5, atol=1e-7
    )


def _products(function: Any, *args: Any) -> int:
    program = str(jax.make_jaxpr(function)(*args))
    return program.count("dot_general") + program.count("ffi_call[")


def test_a_frozen_head_is_not_multiplied_for_a_gradient() -> None:
    """Logits and the rows' gradient: two products, not three."""
    params = tiny.params()
    x, _, targets, counts = _data()

    def loss(x: jax.Array, params: Parameters) -> jax.Array:
        return cross_entropy(params, x, targets, counts, chunk=4)["loss"]

    assert _products(loss, x, params) == 1
    assert _products(jax.grad(loss), x, params) == 2
    assert _products(jax.grad(loss, argnums=(0, 1)), x, params) == 3


def test_a_teacher_of_three_students_is_read_once() -> None:
    params, (students, shares), (_, teacher, _, _) = tiny.params(), _students(), _data()

    def loss(students: jax.Array) -> jax.Array:
        return divergences(params, teacher, students, shares, chunk=4)[0]

    assert _products(loss, students) == 4
    assert _products(jax.grad(loss), students) == 7


def test_memory_is_a_chunk_not_the_batch() -> None:
    """64 rows of 4096 tokens of vocabulary are 1 MB; the whole batch's logits would be 16 MB."""
    params = tiny.params(tiny.config(vocab_size=4096))
    x = jnp.ones((4, 256, 32))
    targets = jnp.zeros((4, 256), jnp.int32)
    counts = jnp.ones((4, 256), jnp.bool_)

    def loss(params: Parameters, x: jax.Array) -> jax.Array:
        return cross_entropy(params, x, targets, counts, chunk=16)["loss"]

    compiled = jax.jit(jax.grad(loss, argnums=(0, 1))).lower(params, x).compile()
    analysis: Any = compiled.memory_analysis()
    assert analysis.temp_size_in_bytes < 8 * 2**20
