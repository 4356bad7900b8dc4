"""Independent heads: each is a model whose last layer is another one, trained and decoded."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mtd_jax import methods
from mtd_jax.decoding import engine
from mtd_jax.decoding.method import Requests
from mtd_jax.decoding.sampling import Sampling, SamplingRows
from mtd_jax.errors import InputError
from mtd_jax.training.whole import WholeTraining
from mtd_jax.transformer.block import Block
from mtd_jax.transformer.model import Parameters, unembed
from mtd_jax.transformer.packed import packed_hidden
from tests.oracle import transformer as oracle
from tests.support import heads, tiny

# Another window in the last layer: that of the heads as well.
CONFIG = tiny.config(sliding_windows=(None, 9, 5), eos_token_ids=())
TEXTS = [[5, 6, 7, 8, 9, 6, 5, 9, 5], [11, 12, 13], [3, 4, 3, 4], [9] * 6]
COUNT = 2


def _with_last(base: Parameters, layers: Block, i: int) -> Parameters:
    """The base with head i in the place of its last layer."""
    blocks = jax.tree.map(lambda w, h: w.at[-1].set(h[i]), base.blocks, layers)
    return base.replace(blocks=blocks)


def _setting() -> tuple[Any, Block, Parameters]:
    model = tiny.language_model(CONFIG)
    spec = methods.make_spec("independent_heads", {"count": COUNT})
    noise = heads.random(model, "independent_heads", count=COUNT).weights
    first = spec.initial(model.params, jax.random.key(0))
    return spec, jax.tree.map(lambda w, x: w + 0.1 * x, first, noise), model.params


def test_the_loss_is_the_plain_sum_over_heads() -> None:
    spec, weights, base = _setting()
    batch = heads.packed(TEXTS)
    counts = spec.counts(batch)

    def loss(weights: Any, base: Any) -> Any:
        return spec.training_loss(weights, base, batch, counts, chunk=5)[0]

    found, (own, others) = jax.jit(jax.value_and_grad(loss, argnums=(0, 1)))(weights, base)
    expected = 0.0
    for i in range(COUNT):
        model, losses = _with_last(base, weights, i), []
        for text in TEXTS:
            logits = oracle.logits(model, text)
            log_q = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
            losses += [-log_q[n, text[n + i + 2]] for n in range(len(text) - i - 2)]
        expected += np.mean(losses)
    assert float(found) == pytest.approx(expected, rel=1e-4)
    assert all(float(jnp.abs(leaf).max()) > 0 for leaf in jax.tree.leaves(own))
    assert all(float(jnp.abs(leaf).max()) == 0 for leaf in jax.tree.leaves(others))


def _whole(params: Parameters, layers: Block) -> jax.Array:
    """The mean cross-entropies of the base and of every head as models of their own, summed."""
    batch, total = heads.packed(TEXTS), jnp.zeros(())
    for i in range(-1, COUNT):
        model = params if i < 0 else _with_last(params, layers, i)
        log_p = jax.nn.log_softmax(unembed(model, packed_hidden(model, batch)))
        rows = [
            log_p[b, n, text[n + i + 2]]
            for b, text in enumerate(TEXTS)
            for n in range(len(text) - i - 2)
        ]
        total -= jnp.stack(rows).mean()
    return total


def test_trunk_and_heads_learn_together() -> None:
    """Value and gradient of all weights, against one big expression."""
    _, weights, base = _setting()
    options = {"count": COUNT, "trunk": "trained"}
    spec: Any = methods.make_spec("independent_heads", options)
    trained = WholeTraining(spec, tuple(sorted(options.items())), 0, 5)
    batch = heads.packed(TEXTS)
    counts = trained.counts(batch)

    def fast(params: Parameters, layers: Block) -> jax.Array:
        return trained.loss((params, layers), (), batch, counts, None)[0]

    found, expected = (
        jax.jit(jax.value_and_grad(loss, argnums=(0, 1)))(base, weights) for loss in (fast, _whole)
    )
    np.testing.assert_allclose(found[0], expected[0], rtol=1e-5)
    for x, y in zip(jax.tree.leaves(found[1]), jax.tree.leaves(expected[1]), strict=True):
        np.testing.assert_allclose(x, y, atol=1e-4 * float(jnp.abs(y).max()) + 1e-12)


def test_heads_of_a_trained_trunk_are_stored_one_at_a_time() -> None:
    batch = jax.eval_shape(lambda: heads.packed([[5] * 128] * 4))

    def temporary(count: int) -> int:
        options = {"count": count, "trunk": "trained"}
        spec: Any = methods.make_spec("independent_heads", options)
        trained = WholeTraining(spec, tuple(options.items()), 0, 64, remat="layer")
        params = jax.eval_shape(lambda: tiny.params(CONFIG))
        weights = jax.eval_shape(spec.initial, params, jax.random.key(0))

        def step(trainable: Any, batch: Any) -> Any:
            counts = trained.counts(batch)
            return jax.grad(lambda w: trained.loss(w, (), batch, counts, None)[0])(trainable)

        compiled: Any = jax.jit(step).lower((params, weights), batch).compile()
        return int(compiled.memory_analysis().temp_size_in_bytes)

    rows = 4 * 128 * CONFIG.hidden_size * 4
    assert temporary(5) - temporary(1) < 4 * 5 * rows


def test_a_trained_trunk_has_nothing_to_distil_from() -> None:
    with pytest.raises(InputError, match="say loss=cross_entropy"):
        methods.make_spec("independent_heads", {"trunk": "trained", "loss": "distillation"})


def test_heads_begin_as_the_last_layer_and_one_is_stored_at_a_time() -> None:
    spec, _, base = _setting()
    for leaf, last in zip(
        jax.tree.leaves(spec.initial(base, jax.random.key(0))),
        jax.tree.leaves(base.blocks),
        strict=True,
    ):
        np.testing.assert_array_equal(leaf, jnp.stack([last[-1]] * COUNT))

    def temporary(count: int) -> int:
        spec = methods.make_spec("independent_heads", {"count": count})
        shapes = jax.eval_shape(lambda: tiny.params(CONFIG))
        batch = jax.eval_shape(lambda: heads.packed([[5] * 128] * 4))
        return heads.training_bytes(spec, shapes, batch, chunk=64)

    # What a head puts out stays for its loss, and its gradient: 2 rows a position each, and as
    # much again for passing them on, which jax 0.12 lays out a little larger.
    rows = 4 * 128 * CONFIG.hidden_size * 4
    assert temporary(5) - temporary(1) < 4 * 5 * rows


def test_guesses_are_those_of_models_with_another_last_layer() -> None:
    """Behind the prompt and behind steps that kept drafts: the heads' keys and values are right."""
    prompts = [[7] * 6, [3, 4, 5, 6], [50, 40, 50, 40, 50]]
    model = tiny.language_model(CONFIG)
    base = model.params
    texts = heads.answers(model, prompts, 30)
    found = heads.fitted(model, texts, "independent_heads", steps=30, count=COUNT)
    method: Any = methods.make_method("independent_heads", {"tree": "2x2"}, found)
    lengths = jnp.asarray([len(p) for p in prompts], jnp.int32)
    tokens = jnp.asarray([p + [0] * (8 - len(p)) for p in prompts], jnp.int32)
    requests = Requests(
        budget=jnp.full(3, 30, jnp.int32),
        stop_ids=jnp.full(8, -1, jnp.int32),
        sampling=SamplingRows.of([Sampling()] * 3),
    )
    state, _ = engine.start(method, base, tokens, lengths, requests, 128)
    for steps in (0, 4):
        if steps:
            state, _ = engine.run(method, base, state, steps)
            assert int(state.tally.histogram[:, 1:].sum()) > 0
        text, length = np.asarray(state.text), np.asarray(state.cache.length)
        for row in range(3):
            kept = text[row, : length[row]].tolist()
            for i in range(COUNT):
                logits = oracle.logits(_with_last(base, found.weights, i), kept)[-1]
                best = np.argsort(-logits)[: method.ranks].tolist()
                assert state.extra.guesses[row, i].tolist() == best
