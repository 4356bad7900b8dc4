"""The likeliest paths, against the probabilities of all of them."""

from __future__ import annotations

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mtd_jax.decoding.row_trees import RowTrees
from mtd_jax.decoding.sampling import Sampling, SamplingRows, draft_scores
from mtd_jax.methods import cp_mixture
from mtd_jax.methods.cp_beam import likeliest_paths
from tests.oracle import cp_mixture as oracle

BATCH, RANK, STEPS, VOCAB = 4, 3, 3, 5
FIRST = jnp.asarray([4, 9, 1, 30], jnp.int32)

_found = jax.jit(likeliest_paths, static_argnames="count")


def _tables(scale: float) -> tuple[jax.Array, jax.Array]:
    keys = jax.random.split(jax.random.key(5))
    w = jax.nn.log_softmax(jax.random.normal(keys[0], (BATCH, RANK)))
    p = jax.nn.log_softmax(scale * jax.random.normal(keys[1], (BATCH, RANK, STEPS, VOCAB)))
    return w, p


def _rows(temperature: float) -> SamplingRows:
    return SamplingRows.of([Sampling(temperature, seed=i) for i in range(BATCH)])


def _paths(trees: RowTrees, columns: jax.Array, row: int) -> list[tuple[int, ...]]:
    """The tokens on the way to every node but the root."""
    tokens = [-9, *columns[row].tolist()]
    return [
        tuple(tokens[n] for n in np.flatnonzero(trees.ancestors[row, node]) if n)
        for node in range(1, trees.size)
    ]


def _chances(w: np.ndarray, p: np.ndarray) -> dict[tuple[int, ...], float]:
    """Of every path, from a mixture's weights [r] and tables [r, steps, V]."""
    return {
        path: float(w @ np.prod([p[:, s, x] for s, x in enumerate(path)], axis=0))
        for length in range(1, STEPS + 1)
        for path in itertools.product(range(VOCAB), repeat=length)
    }


@pytest.mark.parametrize("count", [1, 2, 3, 4, 7, 10, 31])
@pytest.mark.parametrize("scale", [0.3, 3.0])
def test_they_are_the_chain_and_the_likeliest_of_all(count: int, scale: float) -> None:
    w, p = _tables(scale)
    trees, columns, scores = _found(w, p, _rows(0.0), FIRST, count=count)
    assert trees.size == count + 1
    plain_w, plain_p = (np.exp(np.asarray(x, np.float64)) for x in (w, p))
    for row in range(BATCH):
        chances = _chances(plain_w[row], plain_p[row])
        chain: list[tuple[int, ...]] = []
        for _ in range(min(STEPS, count)):
            before = chain[-1] if chain else ()
            chain.append(max(((*before, x) for x in range(VOCAB)), key=lambda p: chances[p]))
        others = sorted(chances.keys() - set(chain), key=lambda path: -chances[path])
        best = [*chain, *others[: count - len(chain)]]
        paths = _paths(trees, columns, row)
        assert set(paths) == set(best)
        np.testing.assert_allclose(np.exp(scores[row]), [chances[x] for x in paths], rtol=1e-5)


def test_scores_add_up_to_the_drafts_that_a_text_of_the_mixture_keeps() -> None:
    w, p = _tables(2.0)
    trees, columns, scores = _found(w, p, _rows(0.0), FIRST, count=6)
    for row in range(BATCH):
        joint = oracle.table(*(np.exp(np.asarray(x[row], np.float64)) for x in (w, p)))
        paths = set(_paths(trees, columns, row))
        kept = sum(
            chance * max(n for n in range(STEPS + 1) if not n or text[:n] in paths)
            for text, chance in np.ndenumerate(joint)
        )
        assert float(np.exp(scores[row]).sum()) == pytest.approx(kept, rel=1e-5)


def test_what_has_no_probability_is_no_draft() -> None:
    """Two tokens a step are possible: 2 + 4 + 8 paths, and the nodes behind them hold nothing."""
    w, p = _tables(1.0)
    p = jax.nn.log_softmax(jnp.where((jnp.arange(VOCAB) < 2)[None, None, None], p, -jnp.inf))
    trees, columns, scores = _found(w, p, _rows(0.0), FIRST, count=20)
    for row in range(BATCH):
        real = {path for path in _paths(trees, columns, row) if -1 not in path}
        every = (itertools.product(range(2), repeat=n) for n in range(1, STEPS + 1))
        assert real == {path for paths in every for path in paths}
        assert int((columns[row] >= 0).sum()) == len(real) == int(jnp.isfinite(scores[row]).sum())


def test_rows_that_draw_share_the_noise_of_the_draw() -> None:
    """A path's score adds up what the softmax of `draft_scores` says of each token on it."""
    w, p = _tables(1.0)
    rows = _rows(0.9)
    trees, columns, scores = _found(w, p, rows, FIRST, count=8)
    tilted = jax.jit(lambda *x: jax.nn.log_softmax(draft_scores(*x)))
    for row in range(BATCH):
        one = jax.tree.map(functools.partial(_only, row), rows)
        for path, score in zip(_paths(trees, columns, row), scores[row].tolist(), strict=True):
            log_pi, total = w[row : row + 1], 0.0
            for s, token in enumerate(path):
                log_q = cp_mixture.mixed(log_pi, p[row : row + 1, :, s])
                total += float(tilted(log_q, one, FIRST[row : row + 1] + s)[0, token])
                log_pi = cp_mixture.seen(log_pi, p[row : row + 1, :, s], jnp.array([token]))
            assert score == pytest.approx(total, abs=1e-4)


def _only(row: int, values: jax.Array) -> jax.Array:
    return values[row : row + 1]
