from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mtd_jax.decoding import verify
from mtd_jax.decoding.sampling import Sampling, SamplingRows, position_keys, sample, typed
from mtd_jax.decoding.tree import TokenTree
from tests.oracle import verify as oracle

BATCH, VOCAB, NODES = 6, 5, 8

# For tests that know only a few shapes; hypothesis's trees are faster one operation at a time.
_siblings = jax.jit(verify.siblings, static_argnames=("tree",))
_rejection = jax.jit(verify.rejection)
_sample = jax.jit(sample)
_position_keys = jax.jit(position_keys)
_draw_siblings = jax.jit(verify.draw_siblings, static_argnums=2)

# Trees of one size, so that few shapes are compiled; the rows of a batch share a tree.
random_parents = st.tuples(*[st.integers(0, node) for node in range(NODES - 1)])
seeds = st.integers(0, 2**32 - 1)
TREES = {
    "root alone": (),
    "chain": (0, 1, 2, 3),
    "star": (0, 0, 0, 0),
    "binary": (0, 0, 1, 1, 2, 2),
    "uneven": (0, 1, 0, 3, 3, 1),
}


def _keys(depths: np.ndarray, batch: int = BATCH, seed: int = 3) -> jax.Array:
    rows = SamplingRows.of([Sampling(1.0, seed=seed + b) for b in range(batch)])
    at = jnp.broadcast_to(jnp.asarray(depths, jnp.int32)[None], (batch, len(depths)))
    return _position_keys(rows, at)


def _verdicts(verdict: verify.Verdict, row: int) -> tuple[list[int], list[int]]:
    """Nodes kept and tokens emitted; what lies behind them must repeat, and is cut off."""
    path, tokens = np.asarray(verdict.path[row]), np.asarray(verdict.tokens[row])
    accepted = int(verdict.accepted[row])
    assert (path[accepted:] == path[accepted]).all()
    return path[: accepted + 1].tolist(), tokens[: accepted + 1].tolist()


def _distinct_siblings(parents: tuple[int, ...], rng: np.random.Generator) -> np.ndarray:
    """[NODES] drafts; siblings differ as far as the vocabulary goes, then there is none."""
    drafts = np.full(len(parents) + 1, -1, np.int32)
    for node in range(len(parents) + 1):
        hanging = oracle.children(parents, node)
        order = [*rng.permutation(VOCAB), *[-1] * len(hanging)]
        drafts[hanging] = order[: len(hanging)]
    return np.where(rng.random(len(drafts)) < 0.1, -1, drafts).astype(np.int32)


def _drawn(parents: tuple[int, ...], drafts: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """[NODES] a token at each node; often one that a child guesses, or nothing was ever kept."""
    drawn = rng.integers(VOCAB, size=len(drafts)).astype(np.int32)
    for node in range(len(drafts)):
        guesses = [d for c in oracle.children(parents, node) if (d := drafts[c]) >= 0]
        if guesses and rng.random() < 0.7:
            drawn[node] = rng.choice(guesses)
    return drawn


def _walk_examples(
    parents: tuple[int, ...], rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    drafts = np.stack([_distinct_siblings(parents, rng) for _ in range(BATCH)])
    return drafts, np.stack([_drawn(parents, row, rng) for row in drafts])


@settings(max_examples=40)
@given(random_parents, seeds)
def test_walk_descends_as_the_oracle_does(parents: tuple[int, ...], seed: int) -> None:
    drafts, drawn = _walk_examples(parents, np.random.default_rng(seed))
    verdict = verify.walk(TokenTree(parents), jnp.asarray(drafts), jnp.asarray(drawn))
    for row in range(BATCH):
        expected = oracle.walk(parents, drafts[row].tolist(), drawn[row].tolist())
        assert _verdicts(verdict, row) == expected


@settings(max_examples=40)
@given(random_parents, seeds)
def test_walk_among_equal_siblings_keeps_the_longest_way(
    parents: tuple[int, ...], seed: int
) -> None:
    """Two drafts of the same token lead to the same text, so what is drawn behind them is equal."""
    rng = np.random.default_rng(seed)
    tree = TokenTree(parents)
    drafts = rng.integers(-1, 2, size=(BATCH, NODES)).astype(np.int32)
    drafts[:, 0] = 0
    texts = [
        [
            tuple(int(drafts[row, n]) for n in np.flatnonzero(tree.ancestors[m]))
            for m in range(NODES)
        ]
        for row in range(BATCH)
    ]
    drawn = np.array([[hash((seed, text)) % 2 for text in row] for row in texts], np.int32)
    verdict = verify.walk(tree, jnp.asarray(drafts), jnp.asarray(drawn))
    for row in range(BATCH):
        path, tokens = _verdicts(verdict, row)
        longest, expected = oracle.walk(parents, drafts[row].tolist(), drawn[row].tolist())
        assert tokens == expected
        assert len(path) == len(longest)
        assert path == tree.paths[path[-1], : len(path)].tolist()
        assert [int(drafts[row, n]) for n in path[1:]] == tokens[:-1]


@pytest.mark.parametrize("parents", TREES.values(), ids=TREES.keys())
def test_walk_of_no_drafts_is_one_draw(parents: tuple[int, ...]) -> None:
    tree = TokenTree(parents)
    drawn = jnp.arange(2 * tree.size, dtype=jnp.int32).reshape(2, tree.size)
    for none in (jnp.full((2, tree.size), -1, jnp.int32), jnp.full((2, tree.size), 99, jnp.int32)):
        # A draw of -1, as no sampler makes it, does not equal a draft that is none.
        for what in (drawn, drawn.at[:, 1:].set(-1)):
            verdict = verify.walk(tree, none, what)
            assert verdict.accepted.tolist() == [0, 0]
            assert verdict.path.tolist() == [[0] * (tree.max_depth + 1)] * 2
            assert verdict.tokens[:, 0].tolist() == drawn[:, 0].tolist()


def test_a_root_alone_emits_one_draw() -> None:
    tree = TokenTree(())
    log_p = jnp.where(jnp.arange(VOCAB) == 3, 0.0, -jnp.inf).astype(jnp.float32)
    log_p = jnp.broadcast_to(log_p, (2, 1, VOCAB))
    drafts, drawn = jnp.zeros((2, 1), jnp.int32), jnp.full((2, 1), 3, jnp.int32)
    for verdict in (
        verify.typical(tree, drafts, drawn, log_p),
        _siblings(tree, drafts, log_p, log_p, _keys(tree.depth, 2)),
    ):
        for row in range(2):
            assert _verdicts(verdict, row) == ([0], [3])


def test_a_row_is_verified_alike_in_any_batch() -> None:
    parents = TREES["uneven"]
    tree = TokenTree(parents)
    drafts, drawn = _walk_examples(parents, np.random.default_rng(0))
    rng = np.random.default_rng(1)
    keys = _keys(tree.depth)
    log_p, log_q = (
        jax.nn.log_softmax(jnp.asarray(rng.normal(size=(BATCH, tree.size, VOCAB)), jnp.float32))
        for _ in range(2)
    )
    arguments: dict[Any, tuple[Any, ...]] = {
        verify.walk: (jnp.asarray(drafts), jnp.asarray(drawn)),
        verify.typical: (jnp.asarray(drafts), jnp.asarray(drawn), log_p),
        _siblings: (jnp.maximum(jnp.asarray(drafts), 0), log_q, log_p, keys),
    }
    for rule, values in arguments.items():
        together = rule(tree, *values)
        for row in range(BATCH):
            alone = rule(tree, *(x[row : row + 1] for x in values))
            assert _verdicts(alone, 0) == _verdicts(together, row)


@settings(max_examples=40)
@given(random_parents, seeds)
def test_typical_is_as_defined(parents: tuple[int, ...], seed: int) -> None:
    rng = np.random.default_rng(seed)
    drafts, drawn = _walk_examples(parents, rng)
    # From flat, where 0.3 exp(-H) decides, to peaked, where 0.09 does; some without any chance.
    sharpness = rng.choice([0.3, 2.0, 6.0], size=(BATCH, NODES, 1))
    logits = rng.normal(size=(BATCH, NODES, VOCAB)) * sharpness
    logits[rng.random(logits.shape) < 0.15] = -np.inf
    logits[..., 0] = np.maximum(logits[..., 0], -3.0)
    log_p = np.asarray(jax.nn.log_softmax(jnp.asarray(logits, jnp.float32)))
    verdict = verify.typical(
        TokenTree(parents), jnp.asarray(drafts), jnp.asarray(drawn), jnp.asarray(log_p)
    )
    for row in range(BATCH):
        expected = oracle.typical(
            parents,
            drafts[row].tolist(),
            drawn[row].tolist(),
            np.exp(log_p[row].astype(np.float64)),
            verify.TYPICAL_EPSILON,
            verify.TYPICAL_DELTA,
        )
        assert _verdicts(verdict, row) == expected


@settings(max_examples=30)
@given(random_parents, seeds)
def test_where_the_model_is_certain_the_rules_agree(parents: tuple[int, ...], seed: int) -> None:
    """One-hot p: `typical` and `siblings` are `walk`, path and all."""
    rng = np.random.default_rng(seed)
    drafts, drawn = _walk_examples(parents, rng)
    tree = TokenTree(parents)
    walked = verify.walk(tree, jnp.asarray(drafts), jnp.asarray(drawn))
    one_hot = np.where(np.eye(VOCAB)[drawn] > 0, 0.0, -np.inf).astype(np.float32)
    verdict = verify.typical(tree, jnp.asarray(drafts), jnp.asarray(drawn), jnp.asarray(one_hot))
    for row in range(BATCH):
        assert _verdicts(verdict, row) == _verdicts(walked, row)
    # `siblings` knows no missing drafts: those become a token that is not drawn there.
    other = (drawn[:, [0, *parents]] + 1) % VOCAB
    there = np.where(drafts >= 0, drafts, other).astype(np.int32)
    walked = verify.walk(tree, jnp.asarray(there), jnp.asarray(drawn))
    log_q = jax.nn.log_softmax(jnp.asarray(rng.normal(size=one_hot.shape), jnp.float32))
    verdict = verify.siblings(
        tree, jnp.asarray(there), log_q, jnp.asarray(one_hot), _keys(tree.depth)
    )
    for row in range(BATCH):
        assert _verdicts(verdict, row) == _verdicts(walked, row)


@pytest.mark.parametrize("depth", [0, 1, 4])
def test_a_chain_of_certain_models_is_walked(depth: int) -> None:
    rng = np.random.default_rng(depth)
    batch = 40
    drawn = rng.integers(3, size=(batch, depth + 1)).astype(np.int32)
    drafts = np.where(rng.random((batch, depth)) < 0.7, drawn[:, :-1], 3).astype(np.int32)
    count = rng.integers(0, depth + 1, size=batch).astype(np.int32)
    real = np.arange(depth)[None, :] < count[:, None]
    drafts = np.where(real, drafts, -1).astype(np.int32)
    eye = np.where(np.eye(VOCAB) > 0, 0.0, -np.inf).astype(np.float32)
    verdict = _rejection(
        jnp.asarray(drafts),
        jnp.asarray(count),
        jnp.asarray(eye[np.maximum(drafts, 0)]),
        jnp.asarray(eye[drawn]),
        _keys(np.arange(depth + 1), batch),
    )
    on_tree = jnp.pad(jnp.asarray(drafts), ((0, 0), (1, 0)))
    walked = verify.walk(TokenTree.chain(depth), on_tree, jnp.asarray(drawn))
    for row in range(batch):
        assert _verdicts(verdict, row) == _verdicts(walked, row)


def test_equal_distributions_keep_every_draft() -> None:
    """p = q: nothing is refused, not even for a rounding error."""
    batch, depth = 500, 3
    logits = jax.random.normal(jax.random.key(0), (batch, depth + 1, VOCAB)) * 3
    log_p = jax.nn.log_softmax(logits)
    keys = _keys(np.arange(depth + 1), batch)
    rows = SamplingRows.of([Sampling(1.0, seed=3 + b) for b in range(batch)])
    drafts = jnp.stack(
        [_sample(logits[:, d], rows, jnp.full(batch, d, jnp.int32)) for d in range(depth)], axis=1
    )
    counts = jnp.full(batch, depth, jnp.int32)
    verdict = _rejection(drafts, counts, log_p[:, :depth], log_p, keys)
    assert set(verdict.accepted.tolist()) == {depth}
    np.testing.assert_array_equal(verdict.tokens[:, :depth], drafts)
    on_tree = jnp.pad(drafts, ((0, 0), (1, 0)))
    verdict = _siblings(TokenTree.chain(depth), on_tree, log_p, log_p, keys)
    assert set(verdict.accepted.tolist()) == {depth}
    np.testing.assert_array_equal(verdict.tokens[:, :depth], drafts)


def test_a_sibling_that_q_does_not_know_is_not_kept() -> None:
    """q has one token and the node two children: the second is no draw from q at all.

    To keep it wherever p allows it would make it too likely.
    """
    tree = TokenTree.branching(2)
    batch = 400
    log_q = jnp.where(jnp.arange(VOCAB) == 2, 0.0, -jnp.inf).astype(jnp.float32)
    log_q = jnp.broadcast_to(log_q, (batch, tree.size, VOCAB))
    log_p = jnp.full((batch, tree.size, VOCAB), -jnp.log(5.0), jnp.float32)
    keys = _keys(tree.depth, batch)
    drafts = jnp.pad(_draw_siblings(log_q[:, 0], keys[:, 0], 2), ((0, 0), (1, 0)))
    assert set(drafts[:, 1].tolist()) == {2}
    verdict = _siblings(tree, drafts, log_q, log_p, keys)
    assert 2 not in set(verdict.path[:, 1].tolist())
    counts = np.bincount(np.asarray(verdict.tokens[:, 0]), minlength=VOCAB)
    # 80 each; five standard deviations are 40.
    assert abs(counts - batch / VOCAB).max() < 40, counts


def test_siblings_are_drawn_without_replacement() -> None:
    batch = 200
    log_q = jax.nn.log_softmax(jax.random.normal(jax.random.key(0), (batch, VOCAB)) * 3)
    keys = _keys(np.arange(1), batch)[:, 0]
    drawn = np.asarray(_draw_siblings(log_q, keys, VOCAB))
    assert drawn.dtype == np.int32
    np.testing.assert_array_equal(np.sort(drawn, axis=1), np.tile(np.arange(VOCAB), (batch, 1)))
    for count in (1, 3):
        np.testing.assert_array_equal(_draw_siblings(log_q, keys, count), drawn[:, :count])
    # What has no chance comes after everything that has one.
    known = jnp.arange(VOCAB) < 2
    some = np.asarray(_draw_siblings(jnp.where(known, log_q, -jnp.inf), keys, 3))
    assert (np.sort(some[:, :2], axis=1) == [0, 1]).all()


def test_the_eldest_sibling_is_what_sample_draws() -> None:
    batch = 100
    logits = jax.random.normal(jax.random.key(1), (batch, VOCAB))
    rows = SamplingRows.of([Sampling(1.0, seed=b) for b in range(batch)])
    positions = jnp.arange(batch, dtype=jnp.int32) * 3
    drawn = _sample(logits, rows, positions)
    keys = _position_keys(rows, positions)
    eldest = _draw_siblings(jax.nn.log_softmax(logits), keys, 2)[:, 0]
    np.testing.assert_array_equal(eldest, drawn)


def test_keys_are_folded_from_seed_position_and_use() -> None:
    rows = SamplingRows.of([Sampling(1.0, seed=s) for s in (0, 5, 2**40 + 1)])
    positions = jnp.array([[0, 1, 7], [0, 7, 7], [3, 2**31 - 1, 0]], jnp.int32)
    keys = _position_keys(rows, positions)
    assert keys.shape == (3, 3, 2)
    for row, seed in enumerate((0, 5, 2**40 + 1)):
        for column in range(3):
            at = positions[row : row + 1, column]
            alone = SamplingRows.of([Sampling(1.0, seed=seed)])
            np.testing.assert_array_equal(_position_keys(alone, at)[0], keys[row, column])
            data = jnp.array([seed >> 32, seed & 0xFFFFFFFF], jnp.uint32)
            folded = jax.random.fold_in(jax.random.wrap_key_data(data), at[0])
            np.testing.assert_array_equal(jax.random.key_data(folded), keys[row, column])
    used = [
        tuple(jax.random.key_data(typed(keys[row, column], *uses)).tolist())
        for row in range(3)
        for column in (0, 1)
        for uses in ((), (0,), (1,), (2,), (1, 0), (1, 1), (0, 1))
    ]
    assert len(set(used)) == len(used)
