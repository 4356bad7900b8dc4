"""What the verification rules emit against exact joint distributions: chi-square, alpha 1e-4.

A model of five tokens is a fixed table: a row of logits for each text of up to two tokens. One
verification emits up to three tokens, then decoding goes on one by one until there are three.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from mtd_jax.decoding import verify
from mtd_jax.decoding.sampling import (
    Sampling,
    SamplingRows,
    log_probabilities,
    position_keys,
    sample,
)
from mtd_jax.decoding.tree import TokenTree
from tests.oracle import sampling as sampling_oracle
from tests.oracle import verify as oracle

DRAWS = 60_000
ALPHA = 1e-4
VOCAB = 5
LENGTH = 3
TEXTS = 1 + VOCAB + VOCAB**2
CHAIN = TokenTree.chain(2)
RULES = ("rejection", "accept always", "no residual")
TREES = (CHAIN, TokenTree.branching(3, 2), TokenTree((0, 0, 2, 2, 2)), TokenTree((0, 1, 0, 0, 0)))


class Case(NamedTuple):
    """A target p and a drafting q."""

    p_logits: np.ndarray
    q_logits: np.ndarray
    p: Sampling = Sampling(1.0, seed=7)
    q: Sampling = Sampling(1.0, seed=7)

    def table(self, which: str) -> oracle.Table:
        logits, s = (self.p_logits, self.p) if which == "p" else (self.q_logits, self.q)
        rows = [
            sampling_oracle.probabilities(
                row.astype(np.float64), s.temperature, s.top_k, s.top_p, s.min_p
            )
            for row in logits
        ]
        return lambda text: rows[int(_text_row(np.array([text], np.int32).reshape(1, -1))[0])]


class Emitted(NamedTuple):
    accepted: jax.Array
    """[draws]"""
    tokens: jax.Array
    """[draws, LENGTH]: of the verification, then of plain decoding."""


def _logits(seed: int, *, only: tuple[int, ...] = (), drop: float = 0.0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    logits = rng.normal(size=(TEXTS, VOCAB)) * 1.3
    lost = rng.random((TEXTS, VOCAB)) < drop
    lost[np.arange(TEXTS), rng.integers(VOCAB, size=TEXTS)] = False
    if only:
        lost |= ~np.isin(np.arange(VOCAB), only)
    return np.where(lost, -np.inf, logits).astype(np.float32)


def _sampling(
    temperature: float, top_k: int = 0, top_p: float = 1.0, min_p: float = 0.0
) -> Sampling:
    return Sampling(temperature, top_k, top_p, min_p, seed=7)


P, Q = _logits(1), _logits(2)
CASES = {
    "equal": Case(P, P),
    "different": Case(P, Q),
    "disjoint": Case(_logits(1, only=(0, 3)), _logits(2, only=(1, 2, 4))),
    "q-of-one-token": Case(P, _logits(2, only=(3,))),
    "q-of-two-tokens": Case(P, _logits(2, only=(1, 4))),
    "zero-mass": Case(_logits(3, drop=0.5), _logits(4, drop=0.5)),
    "greedy": Case(P, Q, _sampling(0.0), _sampling(0.0)),
    "greedy-p": Case(P, Q, _sampling(0.0), _sampling(1.0)),
    "greedy-q": Case(P, Q, _sampling(1.0), _sampling(0.0)),
    "temperature": Case(P, Q, _sampling(0.6), _sampling(1.5)),
    "top-k": Case(P, Q, _sampling(1.0, top_k=3), _sampling(1.0, top_k=3)),
    "top-p": Case(P, Q, _sampling(1.3, top_p=0.8), _sampling(1.3, top_p=0.8)),
    "min-p": Case(P, Q, _sampling(1.3, min_p=0.25), _sampling(1.3, min_p=0.25)),
    "all-filters": Case(P, Q, _sampling(1.7, 4, 0.9, 0.15), _sampling(1.7, 4, 0.9, 0.15)),
    "filtered-p-alone": Case(P, Q, _sampling(0.9, 2), _sampling(1.0)),
}
each_case = pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
each_tree = pytest.mark.parametrize("tree", TREES, ids=lambda tree: str(tree.parents))


def _text_row(text: np.ndarray | jax.Array) -> np.ndarray | jax.Array:
    """[draws, n] tokens -> [draws] their row in a table."""
    row = text[:, 0] * 0 if text.shape[1] else np.zeros(len(text), np.int32)
    for i in range(text.shape[1]):
        row = row * VOCAB + text[:, i]
    return row + sum(VOCAB**i for i in range(text.shape[1]))


class _Model:
    """The same table for every draw; each has positions, hence keys, of its own."""

    def __init__(self, logits: jax.Array, row: SamplingRows) -> None:
        self.logits = logits
        self.rows = row.repeat(DRAWS)
        self.log_table = log_probabilities(logits, row.repeat(TEXTS))

    def positions(self, depth: int) -> jax.Array:
        return jnp.arange(DRAWS, dtype=jnp.int32) * 8 + depth

    def draw(self, text: jax.Array) -> jax.Array:
        return sample(self.logits[_text_row(text)], self.rows, self.positions(text.shape[1]))

    def log(self, text: jax.Array) -> jax.Array:
        return self.log_table[_text_row(text)]

    def keys(self, depths: np.ndarray) -> jax.Array:
        at = self.positions(0)[:, None] + jnp.asarray(depths, jnp.int32)[None, :]
        return position_keys(self.rows, at)


def _emitted(target: _Model, accepted: jax.Array, tokens: jax.Array) -> Emitted:
    text = jnp.zeros((DRAWS, 0), jnp.int32)
    for i in range(LENGTH):
        token = target.draw(text)
        if i < tokens.shape[1]:
            token = jnp.where(i <= accepted, tokens[:, i], token)
        text = jnp.concatenate([text, token[:, None]], axis=1)
    return Emitted(accepted, text)


@jax.jit
def _run_plain(logits: jax.Array, row: SamplingRows) -> jax.Array:
    nothing = jnp.full(DRAWS, -1, jnp.int32)
    return _emitted(_Model(logits, row), nothing, jnp.zeros((DRAWS, 0), jnp.int32)).tokens


@jax.jit
def _run_chain(
    p_logits: jax.Array,
    q_logits: jax.Array,
    p_row: SamplingRows,
    q_row: SamplingRows,
    count: jax.Array,
    rule: jax.Array,
) -> Emitted:
    target, drafter = _Model(p_logits, p_row), _Model(q_logits, q_row)
    text, log_q = jnp.zeros((DRAWS, 0), jnp.int32), []
    for _ in range(LENGTH - 1):
        log_q.append(drafter.log(text))
        text = jnp.concatenate([text, drafter.draw(text)[:, None]], axis=1)
    log_p = jnp.stack([target.log(text[:, :d]) for d in range(LENGTH)], axis=1)
    keys = target.keys(np.arange(LENGTH))
    counts = jnp.full(DRAWS, count, jnp.int32)
    verdict = verify.rejection(text, counts, jnp.stack(log_q, axis=1), log_p, keys)
    # The biased rules: all drafts are kept, or the refused one is replaced by a draw from p.
    accepted = jnp.where(rule == RULES.index("accept always"), LENGTH - 1, verdict.accepted)
    last = jnp.take_along_axis(log_p, accepted[:, None, None], axis=1)[:, 0]
    noise = jax.random.gumbel(jax.random.key(1), last.shape)
    drawn = jnp.argmax(last + noise, axis=-1).astype(jnp.int32)
    index = jnp.arange(LENGTH, dtype=jnp.int32)[None, :]
    padded = jnp.pad(text, ((0, 0), (0, 1)))
    biased = jnp.where(index < accepted[:, None], padded, drawn[:, None])
    tokens = jnp.where(rule == RULES.index("rejection"), verdict.tokens, biased)
    return _emitted(target, accepted, tokens)


@functools.partial(jax.jit, static_argnames=("tree",))
def _run_siblings(
    p_logits: jax.Array,
    q_logits: jax.Array,
    claimed_logits: jax.Array,
    p_row: SamplingRows,
    q_row: SamplingRows,
    tree: TokenTree,
) -> Emitted:
    target, drafter = _Model(p_logits, p_row), _Model(q_logits, q_row)
    claimed = _Model(claimed_logits, q_row)
    keys = target.keys(tree.depth)
    texts = {0: jnp.zeros((DRAWS, 0), jnp.int32)}
    drafts = jnp.zeros((DRAWS, tree.size), jnp.int32)
    for node in range(tree.size):
        children = tree.children(node)
        if children:
            log_q = drafter.log(texts[node])
            drawn = verify.draw_siblings(log_q, keys[:, node], len(children))
            drafts = drafts.at[:, np.array(children)].set(drawn)
            for rank, child in enumerate(children):
                texts[child] = jnp.concatenate([texts[node], drawn[:, rank, None]], axis=1)
    log_p = jnp.stack([target.log(texts[n]) for n in range(tree.size)], axis=1)
    log_q = jnp.stack([claimed.log(texts[n]) for n in range(tree.size)], axis=1)
    verdict = verify.siblings(tree, drafts, log_q, log_p, keys)
    return _emitted(target, verdict.accepted, verdict.tokens)


@functools.partial(jax.jit, static_argnames=("tree",))
def _run_walk(
    p_logits: jax.Array, p_row: SamplingRows, drafts: jax.Array, tree: TokenTree
) -> Emitted:
    target = _Model(p_logits, p_row)
    texts = [
        _text_row(drafts[None, [n for n in range(1, tree.size) if tree.ancestors[node, n]]])[0]
        for node in range(tree.size)
    ]
    logits = jnp.tile(p_logits[jnp.stack(texts)], (DRAWS, 1))
    positions = target.positions(0)[:, None] + jnp.asarray(tree.depth)[None, :]
    drawn = sample(logits, target.rows.repeat(tree.size), positions.reshape(-1))
    on_tree = jnp.broadcast_to(drafts[None], (DRAWS, tree.size))
    verdict = verify.walk(tree, on_tree, drawn.reshape(on_tree.shape))
    return _emitted(target, verdict.accepted, verdict.tokens)


def _chain(case: Case, rule: str = "rejection", count: int = LENGTH - 1) -> Emitted:
    p, q = SamplingRows.of([case.p]), SamplingRows.of([case.q])
    logits = jnp.asarray(case.p_logits), jnp.asarray(case.q_logits)
    return _run_chain(*logits, p, q, jnp.int32(count), jnp.int32(RULES.index(rule)))


def _siblings(case: Case, tree: TokenTree, claimed: np.ndarray | None = None) -> Emitted:
    """Verified against `claimed` instead of the q that drafts are drawn from, if given."""
    p, q = SamplingRows.of([case.p]), SamplingRows.of([case.q])
    logits = [case.p_logits, case.q_logits, case.q_logits if claimed is None else claimed]
    return _run_siblings(*map(jnp.asarray, logits), p, q, tree=tree)


def _p_value(drawn: np.ndarray, expected: np.ndarray) -> float:
    """Of cells by number; 0 where something impossible was drawn. Rare cells count as one."""
    counts = np.bincount(drawn, minlength=expected.size)
    wanted = expected.ravel() * len(drawn)
    if counts[wanted == 0].sum():
        return 0.0
    order = [i for i in np.argsort(wanted) if wanted[i] > 0]
    counts, wanted = counts[order], wanted[order]
    rare = int(np.searchsorted(wanted, 5.0))
    if rare:
        # With the rarest of the others, so that it is no rare cell itself.
        counts, wanted = (np.append(x[rare + 1 :], x[: rare + 1].sum()) for x in (counts, wanted))
    if len(wanted) == 1:
        return 1.0
    return float(stats.chisquare(counts, wanted * (counts.sum() / wanted.sum())).pvalue)


def _codes(tokens: np.ndarray) -> np.ndarray:
    return np.ravel_multi_index(tuple(tokens.T), (VOCAB,) * LENGTH)


def _joint_p_value(case: Case, emitted: Emitted) -> float:
    expected = oracle.joint(case.table("p"), LENGTH, VOCAB)
    return _p_value(_codes(np.asarray(emitted.tokens)), expected)


def _outcome_p_value(outcomes: oracle.Outcomes, emitted: Emitted) -> float:
    """Of what the verification alone emits, the number of drafts kept included."""
    accepted, tokens = np.asarray(emitted.accepted), np.asarray(emitted.tokens)
    shape = (LENGTH, *[VOCAB] * LENGTH)
    expected = np.zeros(shape)
    for (kept, text), chance in outcomes.items():
        expected[(kept, *text, *[0] * (LENGTH - len(text)))] += chance
    counted = np.arange(LENGTH)[None, :] <= accepted[:, None]
    cells = np.ravel_multi_index((accepted, *np.where(counted, tokens, 0).T), shape)
    return _p_value(cells, expected)


@each_case
@each_tree
def test_the_rule_itself_is_lossless(case: Case, tree: TokenTree) -> None:
    """The oracle's enumeration, exactly: otherwise the tests below would compare with nonsense."""
    p, q = case.table("p"), case.table("q")
    outcomes = oracle.siblings(tree.parents, p, q)
    got = oracle.continued(outcomes, p, LENGTH, VOCAB)
    np.testing.assert_allclose(got, oracle.joint(p, LENGTH, VOCAB), atol=1e-12)


@each_case
def test_rejection_is_lossless(case: Case) -> None:
    emitted = _chain(case)
    assert _joint_p_value(case, emitted) > ALPHA
    outcomes = oracle.rejection(case.table("p"), case.table("q"), LENGTH - 1)
    assert _outcome_p_value(outcomes, emitted) > ALPHA


@pytest.mark.parametrize("count", [0, 1])
def test_rejection_of_fewer_drafts_is_lossless(count: int) -> None:
    emitted = _chain(CASES["different"], count=count)
    assert _joint_p_value(CASES["different"], emitted) > ALPHA
    table = CASES["different"].table
    outcomes = oracle.rejection(table("p"), table("q"), count)
    assert _outcome_p_value(outcomes, emitted) > ALPHA


@each_case
@each_tree
def test_siblings_are_lossless(case: Case, tree: TokenTree) -> None:
    emitted = _siblings(case, tree)
    assert _joint_p_value(case, emitted) > ALPHA
    outcomes = oracle.siblings(tree.parents, case.table("p"), case.table("q"))
    assert _outcome_p_value(outcomes, emitted) > ALPHA


@each_case
@each_tree
def test_walk_is_lossless_and_draws_what_plain_decoding_draws(case: Case, tree: TokenTree) -> None:
    # The likeliest tokens as guesses, by rank, the same ones at every node of a depth.
    likely = np.argsort(-case.p_logits[0])
    drafts = np.array([0, *(likely[tree.rank[node]] for node in range(1, tree.size))], np.int32)
    logits, row = jnp.asarray(case.p_logits), SamplingRows.of([case.p])
    emitted = _run_walk(logits, row, jnp.asarray(drafts), tree=tree)
    np.testing.assert_array_equal(emitted.tokens, _run_plain(logits, row))
    assert int(jnp.max(emitted.accepted)) > 0
    assert _joint_p_value(case, emitted) > ALPHA


@pytest.mark.parametrize("rule", RULES[1:])
@pytest.mark.parametrize("name", ["different", "zero-mass", "top-k", "temperature"])
def test_a_biased_chain_is_noticed(rule: str, name: str) -> None:
    assert _joint_p_value(CASES[name], _chain(CASES[name], rule=rule)) < ALPHA


@pytest.mark.parametrize("tree", TREES[1:], ids=lambda tree: str(tree.parents))
def test_a_biased_tree_is_noticed(tree: TokenTree) -> None:
    """Drafts verified against another q than the one that they were drawn from."""
    case = CASES["different"]
    assert _joint_p_value(case, _siblings(case, tree, claimed=case.q_logits * 0.5)) < ALPHA


def test_a_small_bias_is_noticed() -> None:
    """Where every twentieth draw takes the draft unasked."""
    case = CASES["different"]
    honest, biased = _chain(case), _chain(case, rule="accept always")
    mixed = np.where(np.arange(DRAWS)[:, None] % 20 == 0, biased.tokens, honest.tokens)
    assert _joint_p_value(case, honest._replace(tokens=jnp.asarray(mixed))) < ALPHA
