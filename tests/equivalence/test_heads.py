"""Heads are trained on what they will see when they decode, and on nothing else."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mtd_jax import generate, methods
from mtd_jax.decoding import engine
from mtd_jax.decoding.heads import HeadsSpec
from mtd_jax.decoding.method import Requests
from mtd_jax.decoding.sampling import Sampling, SamplingRows
from mtd_jax.methods.medusa import MedusaWeights
from mtd_jax.training.heads import HeadsTraining, measured
from mtd_jax.training.loop import fit
from mtd_jax.transformer.model import Parameters, forward, normed, project
from mtd_jax.transformer.packed import Packed, frozen_rows
from tests.support import heads, tiny
from tests.support.training import (
    SIZES,
    assert_same_bits,
    log_of,
    losses,
    make_run,
    trained,
    write_model,
    write_texts,
)

OPTIONS: list[dict[str, Any]] = [
    {"loss": "distillation"},
    {"loss": "cross_entropy", "decay": 0.5},
    {"loss": "distillation", "own_output": True, "count": 2},
    {"loss": "cross_entropy", "own_output": True, "count": 2},
]
# Two documents and padding; three rows.
ROWS = [([5, 6, 7, 8, 9, 6, 5], [11, 12, 13]), ([3, 4, 3, 4], [9] * 6), ([20] * 3, [21, 22])]


def _batch(rows: list[tuple[list[int], list[int]]] = ROWS) -> Packed:
    width = 12
    tokens, segments, positions = (np.zeros((len(rows), width), np.int32) for _ in range(3))
    for row, documents in enumerate(rows):
        start = 0
        for number, document in enumerate(documents, start=1):
            place = slice(start, start + len(document))
            tokens[row, place], segments[row, place] = document, number
            positions[row, place] = np.arange(len(document))
            start += len(document)
    real = segments > 0
    arrays = (tokens, segments, positions, real, real & (positions > 0))
    return Packed(*map(jnp.asarray, arrays))


def _setting(options: dict[str, Any]) -> tuple[HeadsSpec, MedusaWeights, Parameters]:
    model = tiny.language_model()
    spec = methods.make_spec("medusa", options)
    return spec, heads.random(model, "medusa", **options).weights, model.params


def _log_softmax(x: np.ndarray) -> np.ndarray:
    x = x.astype(np.float64)
    x = x - x.max(-1, keepdims=True)
    return x - np.log(np.exp(x).sum(-1, keepdims=True))


def _oracle(
    options: dict[str, Any], weights: MedusaWeights, base: Parameters
) -> tuple[float, list[float]]:
    """The loss document by document, head by head, token by token."""
    count = options.get("count", 3)
    head = np.asarray(base.embedding.T if base.head is None else base.head, np.float64)
    sums, right, numbers = np.zeros(count), np.zeros(count), np.zeros(count)
    for document in (d for row in ROWS for d in row):
        tokens = jnp.asarray([document], jnp.int32)
        logits = np.asarray(forward(base, tokens)[0])
        batch = heads.packed([document])
        h = np.asarray(normed(base, frozen_rows(base, batch))[0], np.float64)
        for i in range(count):
            z = h @ np.asarray(weights.weight[:, i], np.float64) + np.asarray(weights.bias[i])
            row = h + z / (1 + np.exp(-z))
            matrix = np.asarray(weights.output[i], np.float64) if weights.output else head
            log_q = _log_softmax(row @ matrix)
            for n in range(len(document) - i - 2):
                log_p = _log_softmax(logits[n + i + 1])
                target = document[n + i + 2]
                best = log_q[n].argmax()
                if options["loss"] == "distillation":
                    sums[i] += float((np.exp(log_p) * (log_p - log_q[n])).sum())
                    right[i] += best == log_p.argmax()
                else:
                    sums[i] -= log_q[n, target]
                    right[i] += best == target
                numbers[i] += 1
    decay = options.get("decay", 0.8)
    loss = sum(decay**i * sums[i] / numbers[i] for i in range(count))
    return float(loss), list(right / numbers)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_the_loss_is_the_sum_over_documents(options: dict[str, Any]) -> None:
    spec, weights, base = _setting(options)
    batch = _batch()
    loss, totals = spec.training_loss(weights, base, batch, spec.counts(batch), chunk=5)
    expected, right = _oracle(options, weights, base)
    assert float(loss) == pytest.approx(expected, rel=1e-4)
    found = [float(totals[f"accuracy_{i + 1}"]) for i in range(spec.depth)]
    np.testing.assert_allclose(found, right, atol=1e-6)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_gradients_are_the_heads_alone(options: dict[str, Any]) -> None:
    spec, weights, base = _setting(options)
    batch = _batch()
    counts = spec.counts(batch)

    def loss(weights: Any, base: Any) -> Any:
        return spec.training_loss(weights, base, batch, counts, chunk=5)[0]

    own, others = jax.grad(loss, argnums=(0, 1))(weights, base)
    for leaf in jax.tree.leaves(own):
        assert float(jnp.abs(leaf).max()) > 0
    assert all(float(jnp.abs(leaf).max()) == 0 for leaf in jax.tree.leaves(others))


def test_nothing_of_the_layers_is_stored() -> None:
    """The memory of a step does not grow with the number of layers."""

    def temporary(layers: int) -> int:
        config = tiny.config(num_layers=layers)
        base = jax.eval_shape(lambda: tiny.params(config))
        spec = methods.make_spec("medusa", {})
        batch = jax.eval_shape(lambda: jax.tree.map(lambda x: jnp.tile(x, (8, 10)), _batch()))
        return heads.training_bytes(spec, base, batch, chunk=16)

    few, many = temporary(2), temporary(10)
    activations = 24 * 120 * tiny.CONFIG.hidden_size * 4  # of one layer: its input alone
    assert many - few < activations


@pytest.mark.parametrize("own_output", [False, True])
def test_training_and_decoding_compute_the_same_logits(own_output: bool) -> None:
    model = tiny.language_model()
    found = heads.random(model, own_output=own_output)
    method: Any = methods.make_method("medusa", {"tree": "chain"}, found)
    texts = [list(range(3, 12)), [40, 41, 40, 41, 40], [7] * 14]
    batch = heads.packed(texts)
    h = normed(model.params, frozen_rows(model.params, batch))
    rows = found.weights.rows(h)
    lengths = jnp.asarray([len(t) for t in texts], jnp.int32)
    requests = Requests(
        budget=jnp.full(3, 5, jnp.int32),
        stop_ids=jnp.full(8, -1, jnp.int32),
        sampling=SamplingRows.of([Sampling()] * 3),
    )
    padded = jnp.pad(batch.tokens, ((0, 0), (0, 2)))
    state, _ = engine.start(method, model.params, padded, lengths, requests, 128)
    decoded = np.asarray(method.logits(model.params, state.extra.row))
    for row, length in enumerate(lengths.tolist()):
        for i in range(3):
            reader = found.weights.head(model.params, i)
            trained_logits = np.asarray(project(reader, rows[row, length - 1, i]))
            np.testing.assert_allclose(decoded[row, i], trained_logits, atol=1e-4)
            best = np.asarray(state.extra.guesses[row, i])
            assert best[0] == trained_logits.argmax()


def test_drafts_after_a_step_come_from_the_last_token_kept() -> None:
    """What a step leaves behind is what a new prompt of the longer text would begin with."""
    model = tiny.language_model()
    prompts = [[7] * 6, [3, 4, 5, 6], [50, 40, 50, 40, 50]]
    found = heads.fitted(model, heads.answers(model, prompts, 30))
    method: Any = methods.make_method("medusa", {"tree": "2x2x1"}, found)
    lengths = jnp.asarray([len(p) for p in prompts], jnp.int32)
    tokens = jnp.asarray([p + [0] * (8 - len(p)) for p in prompts], jnp.int32)
    requests = Requests(
        budget=jnp.full(3, 30, jnp.int32),
        stop_ids=jnp.full(8, -1, jnp.int32),
        sampling=SamplingRows.of([Sampling()] * 3),
    )
    state, _ = engine.start(method, model.params, tokens, lengths, requests, 128)
    state, _ = engine.run(method, model.params, state, 3)
    assert int(state.tally.histogram[:, 1:].sum()) > 0
    text, length = np.asarray(state.text), np.asarray(state.cache.length)
    for row in range(3):
        kept = text[row, : length[row]].tolist()
        batch = heads.packed([kept])
        h = frozen_rows(model.params, batch)[0, -1:]
        expected = method.guesses(model.params, h, method.ranks)
        np.testing.assert_array_equal(state.extra.guesses[row], expected[0])


def test_plain_steps_where_drafts_do_not_pay() -> None:
    model = tiny.language_model()
    found = heads.random(model)
    method: Any = methods.make_method("medusa", {}, found)
    dear = method.replace(costs=jnp.asarray([1.0, *[1e6] * (len(method.sizes) - 1)], jnp.float32))
    (done,) = generate(model, dear, [[3, 4, 5]], max_new_tokens=12)
    (plain,) = generate(model, methods.autoregressive(), [[3, 4, 5]], max_new_tokens=12)
    assert done.token_ids == plain.token_ids
    assert done.metrics.drafted == 0
    assert done.metrics.forwards == 12


def test_useless_heads_are_left_alone_after_a_while() -> None:
    """Heads that promise much and are never right: adaptation ends the drafting."""
    model = tiny.language_model(tiny.config(eos_token_ids=()))
    found = heads.random(model)
    promise = {"accuracies": [[0.8, 0.1]] * 3}
    method: Any = methods.make_method("medusa", {}, dataclasses.replace(found, record=promise))
    method = method.replace(costs=jnp.asarray([1.0, *[2.0] * (len(method.sizes) - 1)]))
    (done,) = generate(model, method, [[3, 4, 5]], max_new_tokens=60)
    assert 0 < done.metrics.spec_steps < 15


def test_accuracies_are_those_of_a_slow_count() -> None:
    model = tiny.language_model()
    prompts = [[7] * 6, [3, 4, 5, 6], [50, 40, 50, 40, 50], [9, 8, 7]]
    texts = heads.answers(model, prompts, 25)
    found = heads.fitted(model, texts[:2], steps=15)
    spec = methods.make_spec("medusa", {})
    objective = HeadsTraining(spec, (), seed=0, chunk=heads.CHUNK)
    batch = heads.packed(texts)
    begins = np.array([[len(p)] for p in prompts])
    # Everything is learned, as with data.loss = "all"; the answers alone are measured.
    batch = batch.replace(answer=batch.learn & (np.asarray(batch.positions) >= begins))
    record = measured(objective, found.weights, model.params, [batch], ranks=4)
    right, reached = np.zeros((3, 4)), np.zeros(3)
    for text, prompt in zip(texts, prompts, strict=True):
        own = forward(model.params, jnp.asarray([text], jnp.int32))[0].argmax(-1).tolist()
        x = frozen_rows(model.params, heads.packed([text]))[0]
        method: Any = methods.make_method("medusa", {"tree": "chain"}, found)
        at = method.guesses(model.params, x, 4)
        for n in range(len(text)):
            for i in range(3):
                if n + i + 2 >= len(text) or text[n + i + 1] != own[n + i]:
                    break
                hits = np.asarray(at[n, i]) == own[n + i + 1]
                if n + i + 2 >= len(prompt):
                    reached[i] += 1
                    right[i] += hits
                if not hits.any():
                    break
    assert record["positions"] == reached.astype(int).tolist()
    np.testing.assert_allclose(record["accuracies"], right / reached[:, None], atol=1e-5)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("heads")
    write_model(directory)
    write_texts(directory)
    return directory


def test_a_resumed_run_is_bit_identical(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    options = {"method": "medusa", "options": {"count": 2}}
    whole, log = trained(place, out=str(place / "whole"), **options)
    with monkeypatch.context() as patch:
        patch.setattr(
            "mtd_jax.training.preemption.StopRequest.reached", lambda self, step: step == 4
        )
        stopped = fit(make_run(place, out=str(place / "resumed"), **options))
    assert not stopped.finished
    outcome, again = trained(place, out=str(place / "resumed"), **options)
    assert outcome.finished
    assert_same_bits(outcome.state, whole.state)
    assert again == log == log_of(place / "whole")
    held_out = [line["held_out_loss"] for line in log if "held_out_loss" in line]
    assert held_out[-1] < held_out[0]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("method", "options"),
    [
        ("medusa", {"count": 2, "loss": "cross_entropy"}),
        ("medusa", {"count": 2, "loss": "cross_entropy", "own_output": True}),
        ("medusa", {"count": 2, "vocabulary": 64}),
        ("hidden_transfer", {"count": 2, "loss": "cross_entropy", "rank": 0}),
        ("hidden_transfer", {"count": 2, "loss": "cross_entropy", "rank": 4}),
        ("cp", {"tokens": 2, "rank": 2, "balance": 0.1}),
        ("cp", {"tokens": 2, "rank": 2, "loss": "joint", "trunk": "trained"}),
        ("independent_heads", {"count": 2}),
    ],
    ids=str,
)
def test_a_mesh_has_the_same_losses(
    tmp_path_factory: pytest.TempPathFactory, method: str, options: dict[str, Any]
) -> None:
    directory = tmp_path_factory.mktemp("mesh")
    write_model(directory, **SIZES)
    write_texts(directory)
    mesh = {"mesh__data": 2, "mesh__fsdp": 2, "mesh__tensor": 2}
    found = []
    for name, changes in (("one", {}), ("eight", mesh)):
        _, log = trained(
            directory,
            out=str(directory / name),
            method=method,
            options=options,
            optimizer__steps=2,
            evaluate__every=0,
            **changes,
        )
        found.append(losses(log))
    np.testing.assert_allclose(found[1], found[0], rtol=1e-5)


def test_the_base_stays_as_it_was(place: Path) -> None:
    outcome, _ = trained(place, out=str(place / "frozen"), method="medusa", optimizer__steps=3)
    run = make_run(place, out=str(place / "frozen-too"), method="medusa")
    assert_same_bits(outcome.frozen, run.load().params)
    assert isinstance(outcome.state.trainable, MedusaWeights)
