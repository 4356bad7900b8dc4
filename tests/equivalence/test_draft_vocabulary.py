"""Heads that draft frequent tokens alone train and decode as if there were no others."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import mtd_jax as mtd
from mtd_jax import generate, methods
from mtd_jax.cli.train import prepare_run, result_of
from mtd_jax.decoding.draft_vocabulary import DraftVocabulary, cut, likeliest, most_frequent
from mtd_jax.decoding.sampling import Sampling
from mtd_jax.errors import InputError
from mtd_jax.training.config import parse_config
from mtd_jax.training.heads import HeadsTraining, measured
from mtd_jax.transformer.model import project
from tests.support import heads, tiny
from tests.support.training import trained, values, write_model, write_texts

HEADS: dict[str, dict[str, Any]] = {
    "medusa": {"count": 2},
    "hidden_transfer": {"count": 2},
    "cp": {"tokens": 3, "rank": 2, "factor": 8},
}
TEXTS = [[3, 4, 5, 6, 7, 8, 9, 3, 4, 5], [11, 12, 11, 12, 11, 12, 11]]


def _rows(model: Any, ids: Any) -> np.ndarray:
    head = model.params.embedding if model.params.head is None else model.params.head.T
    return np.asarray(head, np.float64)[np.asarray(ids)]


@pytest.mark.parametrize("name", HEADS)
def test_all_tokens_in_another_order_change_nothing(name: str) -> None:
    model = tiny.language_model()
    found = heads.random(model, name, **HEADS[name])
    spec: Any = methods.make_spec(name, HEADS[name])
    batch = heads.packed(TEXTS)
    ids = tuple(np.random.default_rng(0).permutation(model.config.vocab_size).tolist())
    task = (found.weights, model.params, batch)
    loss, totals = spec.training_loss(*task, spec.counts(batch), chunk=5)
    same, others = spec.training_loss(*task, spec.counts(batch), chunk=5, vocabulary=ids)
    np.testing.assert_allclose(same, loss, rtol=1e-5)
    for key, value in totals.items():
        np.testing.assert_allclose(others[key], value, rtol=1e-5, err_msg=key)
    for a, b in zip(
        spec.guesses(*task, 4, chunk=5),
        spec.guesses(*task, 4, chunk=5, vocabulary=ids),
        strict=True,
    ):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("name", ["medusa", "hidden_transfer"])
def test_the_loss_is_of_what_both_say_among_the_frequent(name: str) -> None:
    """A slow sum, place by place, with both distributions over these tokens alone."""
    model = tiny.language_model()
    found = heads.random(model, name, count=2)
    spec: Any = methods.make_spec(name, {"count": 2, "decay": 0.5})
    batch = heads.packed(TEXTS)
    ids = (3, 11, 4, 9, 20)
    loss, _ = spec.training_loss(
        found.weights, model.params, batch, spec.counts(batch), chunk=5, vocabulary=ids
    )
    h, rows = (np.asarray(x, np.float64) for x in spec.rows(found.weights, model.params, batch))
    matrix = _rows(model, ids)
    expected = 0.0
    for i in range(2):
        losses = []
        for b, text in enumerate(TEXTS):
            for n in range(len(text) - i - 2):
                log_p, log_q = (
                    np.asarray(jax.nn.log_softmax(jnp.asarray(x @ matrix.T, jnp.float32)), float)
                    for x in (h[b, n + i + 1], rows[b, n, i])
                )
                losses.append(float((np.exp(log_p) * (log_p - log_q)).sum()))
        expected += 0.5**i * float(np.mean(losses))
    assert float(loss) == pytest.approx(expected, rel=1e-4)


def test_the_likeliest_are_the_best_of_those_that_may_be_drafted() -> None:
    model = tiny.language_model()
    ids = [9, 3, 30, 12, 5, 21]
    vocabulary = DraftVocabulary.of(model.params, ids)
    rows = jax.random.normal(jax.random.key(0), (3, 2, model.config.hidden_size))
    found = likeliest(vocabulary, model.params, rows, 8)
    logits = np.asarray(project(model.params, rows))[..., ids]
    expected = np.asarray(ids)[np.argsort(-logits, axis=-1)]
    np.testing.assert_array_equal(found[..., :6], expected)
    assert (np.asarray(found[..., 6:]) == -1).all()
    np.testing.assert_allclose(project(cut(model.params, ids), rows), logits, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", HEADS)
@pytest.mark.parametrize("tree", ["chain", "3x2"])
def test_decoding_is_lossless_and_drafts_nothing_else(name: str, tree: str) -> None:
    model = tiny.language_model(tiny.config(eos_token_ids=()))
    answers = heads.answers(model, [[3, 4, 5], [7] * 6], 30)
    found = heads.fitted(model, answers, name, steps=30, **HEADS[name])
    ids = list(most_frequent(map(np.asarray, answers), model.config.vocab_size, 12))
    few = dataclasses.replace(found, vocabulary=DraftVocabulary.of(model.params, ids))
    method: Any = methods.make_method(name, {"tree": tree}, few)
    prompts = [[3, 4, 5], [7] * 6, [40, 41]]
    plain = generate(model, methods.autoregressive(), prompts, max_new_tokens=40)
    done = generate(model, method, prompts, max_new_tokens=40)
    assert [d.token_ids for d in done] == [p.token_ids for p in plain]
    assert sum(d.metrics.accepted for d in done) > 0
    assert method.partial_bytes(model.params, 0.0) < methods.make_method(
        name, {"tree": tree}, found
    ).partial_bytes(model.params, 0.0)


@pytest.mark.parametrize("decoding", [{"tree": "2x2"}, {"acceptance": "rejection"}], ids=str)
@pytest.mark.parametrize("temperature", [0.0, 0.9])
def test_drafts_do_not_depend_on_the_order_of_columns(
    decoding: dict[str, Any], temperature: float
) -> None:
    """Noise is a token's, and a mixture's distribution over all tokens the same."""
    model = tiny.language_model(tiny.config(eos_token_ids=()))
    answers = heads.answers(model, [[3, 4, 5], [7] * 6], 30)
    found = heads.fitted(model, answers, "cp", steps=30, **HEADS["cp"])
    order = np.random.default_rng(1).permutation(model.config.vocab_size).tolist()
    mixed = dataclasses.replace(found, vocabulary=DraftVocabulary.of(model.params, order))
    done = [
        generate(
            model,
            methods.make_method("cp", {"tree": "chain"} | decoding, each),
            [[3, 4, 5], [7] * 6, [40, 41]],
            max_new_tokens=40,
            sampling=Sampling(temperature, seed=5),
        )
        for each in (found, mixed)
    ]
    told = [[(c.token_ids, c.metrics.accepted) for c in each] for each in done]
    assert told[0] == told[1]
    assert sum(accepted for _, accepted in told[0]) > 0


def test_frequent_tokens_come_first_and_ties_in_order() -> None:
    texts = [np.array([5, 5, 2]), np.array([2, 5, 9])]
    assert most_frequent(texts, 10, 5) == (5, 2, 9, 0, 1)


def test_trained_and_loaded_with_the_tokens_of_the_answers(tmp_path: Path) -> None:
    write_model(tmp_path)
    write_texts(tmp_path)
    changes = {"method": "medusa", "options": {"count": 2, "vocabulary": 64}}
    _, log = trained(tmp_path, **changes)
    held_out = [line["held_out_loss"] for line in log if "held_out_loss" in line]
    assert held_out[-1] < held_out[0]
    run = prepare_run(parse_config(values(tmp_path, **changes)))
    objective = run.trainer.objective
    assert isinstance(objective, HeadsTraining)
    counted = most_frequent(
        (np.asarray(r.tokens[r.answer]) for r in (run.train[i] for i in range(len(run.train)))),
        run.model.vocab_size,
        64,
    )
    assert objective.vocabulary == counted
    base = run.load()
    weights, frozen = objective.split(base.params)
    record = measured(objective, weights, frozen, [heads.packed(TEXTS)])
    assert len(record["top1"]) == 2
    assert result_of(run).name == "heads"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"vocabulary": 5}, "at least 64"),
        ({"vocabulary": -1}, "at least 64"),
        ({"vocabulary": 64, "loss": "cross_entropy"}, "distillation alone"),
        ({"vocabulary": 64, "own_output": True}, "does not go with own_output"),
    ],
)
def test_what_does_not_go_together_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        methods.make_spec("medusa", options)
    others = {"loss": "joint"} if "loss" in options else {}
    with pytest.raises(InputError, match=message):
        methods.make_spec("cp", options | others)


@pytest.mark.parametrize("ids", [None, [], [1, 1], [1.5], [-1], [10**9], "12", [True]])
def test_ids_that_are_none_are_refused(ids: Any) -> None:
    with pytest.raises(InputError, match="must hold different ids under"):
        DraftVocabulary.of(tiny.language_model().params, ids)


def test_heads_without_their_ids_are_refused(tmp_path: Path) -> None:
    from mtd_jax.convert.heads import save_heads

    model = tiny.language_model()
    found = heads.random(model, "medusa", count=2)
    options = {"count": 2, "vocabulary": 64}
    save_heads(dataclasses.replace(found, options=options), tmp_path / "heads")
    with pytest.raises(InputError, match="must hold different ids under"):
        mtd.load_heads(tmp_path / "heads", model)
