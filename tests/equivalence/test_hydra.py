"""Hydra's heads: trained on what they are told in the text, asked along the paths of a tree."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mtd_jax import methods
from mtd_jax.decoding import engine
from mtd_jax.decoding.heads import Heads
from mtd_jax.decoding.method import Requests
from mtd_jax.decoding.sampling import Sampling, SamplingRows
from mtd_jax.decoding.tree import TokenTree
from mtd_jax.methods.hydra import HydraWeights
from mtd_jax.transformer.model import Parameters, forward, normed
from mtd_jax.transformer.packed import frozen_rows
from tests.support import heads, tiny

TEXTS = [[5, 6, 7, 8, 9, 6, 5], [3, 4, 3, 4], [20, 21, 22]]
COUNT = 3


def _log_softmax(x: np.ndarray) -> np.ndarray:
    x = x - x.max(-1, keepdims=True)
    return x - np.log(np.exp(x).sum(-1, keepdims=True))


def _oracle(weights: HydraWeights, base: Parameters, known: list[int], told: list[int]) -> Any:
    """Log-probabilities of the token behind known + told, by the head that is told so many."""
    i = len(told) - 1
    h = np.asarray(normed(base, frozen_rows(base, heads.packed([known])))[0, -1], np.float64)
    z = h @ np.asarray(weights.weight[i], np.float64) + np.asarray(weights.bias[i])
    for j, token in enumerate(told):
        e = np.asarray(base.embedding[token], np.float64)
        z = z + e / np.sqrt((e * e).mean()) @ np.asarray(weights.told[i * (i + 1) // 2 + j])
    head = np.asarray(base.embedding.T if base.head is None else base.head, np.float64)
    return _log_softmax((h + z / (1 + np.exp(-z))) @ head)


def test_the_loss_is_the_sum_over_documents() -> None:
    model = tiny.language_model()
    spec, base = methods.make_spec("hydra", {"count": COUNT}), model.params
    weights = heads.random(model, "hydra", count=COUNT).weights
    batch = heads.packed(TEXTS)
    loss, totals = spec.training_loss(weights, base, batch, spec.counts(batch), chunk=5)
    sums, right, numbers = np.zeros(COUNT), np.zeros(COUNT), np.zeros(COUNT)
    for text in TEXTS:
        logits = np.asarray(forward(base, jnp.asarray([text], jnp.int32))[0], np.float64)
        for i in range(COUNT):
            for n in range(len(text) - i - 2):
                log_q = _oracle(weights, base, text[: n + 1], text[n + 1 : n + i + 2])
                log_p = _log_softmax(logits[n + i + 1])
                sums[i] += float((np.exp(log_p) * (log_p - log_q)).sum())
                right[i] += log_q.argmax() == log_p.argmax()
                numbers[i] += 1
    expected = sum(0.8**i * sums[i] / numbers[i] for i in range(COUNT))
    assert float(loss) == pytest.approx(float(expected), rel=1e-4)
    found = [float(totals[f"accuracy_{i + 1}"]) for i in range(COUNT)]
    np.testing.assert_allclose(found, right / numbers, atol=1e-6)


def test_gradients_are_the_heads_alone() -> None:
    model = tiny.language_model()
    spec = methods.make_spec("hydra", {"count": COUNT})
    weights = heads.random(model, "hydra", count=COUNT).weights
    batch = heads.packed(TEXTS)

    def loss(weights: Any, base: Any) -> Any:
        return spec.training_loss(weights, base, batch, spec.counts(batch), chunk=5)[0]

    own, others = jax.grad(loss, argnums=(0, 1))(weights, model.params)
    assert all(float(jnp.abs(leaf).max()) > 0 for leaf in jax.tree.leaves(own))
    assert all(float(jnp.abs(leaf).max()) == 0 for leaf in jax.tree.leaves(others))


def _started(found: Heads, prompts: list[list[int]], **options: Any) -> tuple[Any, Any]:
    method: Any = methods.make_method("hydra", options, found)
    model = tiny.language_model()
    width = max(map(len, prompts))
    requests = Requests(
        budget=jnp.full(len(prompts), 30, jnp.int32),
        stop_ids=jnp.full(8, -1, jnp.int32),
        sampling=SamplingRows.of([Sampling()] * len(prompts)),
    )
    tokens = jnp.asarray([p + [0] * (width - len(p)) for p in prompts], jnp.int32)
    lengths = jnp.asarray([len(p) for p in prompts], jnp.int32)
    state, _ = engine.start(method, model.params, tokens, lengths, requests, 128)
    return method, state


def test_every_path_of_a_tree_is_continued_by_guesses_of_its_own() -> None:
    model, tree = tiny.language_model(), TokenTree.branching(3, 2, 1)
    found = heads.random(model, "hydra", seed=3, count=COUNT)
    method, state = _started(found, TEXTS, tree="3x2x1")
    _, drafts = method.proposed(model.params, state, tree)
    for row, text in enumerate(TEXTS):
        on_tree = [int(state.pending[row]), *np.asarray(drafts[row]).tolist()]
        for node in range(tree.size):
            children = tree.children(node)
            if not children:
                continue
            told = [on_tree[n] for n in tree.paths[node, : tree.depth[node] + 1]]
            log_p = _oracle(found.weights, model.params, text, told)
            likeliest = np.argsort(-log_p)[: len(children)]
            assert [on_tree[child] for child in children] == likeliest.tolist()


def test_drafts_after_a_step_follow_from_the_last_token_kept() -> None:
    """What a step leaves behind is what a new prompt of the longer text would begin with."""
    model, tree = tiny.language_model(), TokenTree.branching(2, 2, 1)
    prompts = [[7] * 6, [3, 4, 5, 6], [50, 40, 50, 40, 50]]
    found = heads.fitted(model, heads.answers(model, prompts, 30), "hydra")
    method, state = _started(found, prompts, tree="2x2x1")
    state, _ = engine.run(method, model.params, state, 3)
    assert int(state.tally.histogram[:, 1:].sum()) > 0
    _, drafts = method.proposed(model.params, state, tree)
    text, length = np.asarray(state.text), np.asarray(state.cache.length)
    for row in range(3):
        known = text[row, : length[row]].tolist()
        log_p = _oracle(found.weights, model.params, known, [int(state.pending[row])])
        assert int(drafts[row, 0]) == log_p.argmax()


def test_later_guesses_depend_on_what_they_are_told() -> None:
    """Texts in which two tokens back decide: what Medusa's heads cannot know, these learn."""
    model = tiny.language_model()
    texts = [[a, b, (a + b) % 60 + 30] * 3 for a in range(3, 9) for b in range(10, 14)]
    spec = methods.make_spec("hydra", {"loss": "cross_entropy", "count": 2})
    told = heads.fitted(model, texts, "hydra", steps=150, loss="cross_entropy", count=2)
    blind = heads.fitted(model, texts, "medusa", steps=150, loss="cross_entropy", count=2)
    batch = heads.packed(texts)

    def right(spec: Any, weights: Any) -> float:
        counts = spec.counts(batch)
        found = spec.training_loss(weights, model.params, batch, counts, chunk=64)[1]
        return float(found["accuracy_2"])

    assert right(spec, told.weights) > 0.9
    other = methods.make_spec("medusa", {"loss": "cross_entropy", "count": 2})
    assert right(spec, told.weights) > right(other, blind.weights) + 0.1
