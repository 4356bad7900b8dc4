"""Tasks of lm-eval on a tiny model: what the harness is told is what the model says."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mtd_jax import generate, methods
from mtd_jax.convert.load import load
from mtd_jax.decoding.language_model import LanguageModel
from mtd_jax.decoding.requests import Prompt
from mtd_jax.decoding.score import logits
from mtd_jax.evaluation.harness import Answerer
from tests.oracle import dmtd as oracle
from tests.support.command_line import assert_refused, run_commands
from tests.support.training import write_model

PAIRS = [("the quick ", "brown fox"), ("a lazy dog", " sleeps"), ("", "over"), ("and then", "!")]
TASK = """\
task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: {kind}
doc_to_text: "{{{{question}}}}"
"""


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("harness")
    write_model(directory, num_layers=3)
    return directory


def _answerer(model: LanguageModel, method: Any, batch_size: int = 1) -> Answerer:
    return Answerer(model, method, batch_size, False, lambda _: None)


def _ids(model: LanguageModel, pair: tuple[str, str]) -> tuple[list[int], list[int]]:
    assert model.tokenizer is not None
    context, both = pair[0].rstrip(), "".join(pair)
    start = model.tokenizer.encode(context) if context else [1]
    return start, ([] if context else [1]) + model.tokenizer.encode(both)


def test_likelihoods_are_sums_of_log_probabilities(place: Path) -> None:
    model = load(place / "model")
    found = _answerer(model, methods.autoregressive()).likelihoods(PAIRS)
    batched = _answerer(model, methods.autoregressive(), 3).likelihoods(PAIRS)
    for pair, (score, likeliest), (other, _) in zip(PAIRS, found, batched, strict=True):
        start, both = _ids(model, pair)
        rows = np.asarray(logits(model, [both]))[0, len(start) - 1 : -1].astype(np.float64)
        rows -= np.log(np.exp(rows).sum(axis=1, keepdims=True))
        targets = both[len(start) :]
        assert score == pytest.approx(rows[np.arange(len(targets)), targets].sum(), abs=1e-3)
        assert other == pytest.approx(score, abs=1e-3)
        assert likeliest == (rows.argmax(axis=1).tolist() == targets)


@pytest.mark.filterwarnings("ignore:these weights were not trained")
def test_likelihoods_in_cycles_are_the_oracles(place: Path) -> None:
    model = load(place / "model")
    method = methods.dmtd(cycle=2, early=1, late=1)
    found = _answerer(model, method, 2).likelihoods(PAIRS)
    stacked = load(place / "model", mesh=None)
    params = stacked.params
    for pair, (score, _) in zip(PAIRS, found, strict=True):
        start, both = _ids(model, pair)
        places = oracle.places(len(both), len(start), 2, "prompt")
        rows = oracle.logits(_stacked(params), both, places, 1, 1)[len(start) - 1 : -1]
        rows -= np.log(np.exp(rows).sum(axis=1, keepdims=True))
        targets = both[len(start) :]
        assert score == pytest.approx(rows[np.arange(len(targets)), targets].sum(), abs=1e-3)


def _stacked(params: Any) -> Any:
    import jax
    import jax.numpy as jnp

    return params.replace(blocks=jax.tree.map(lambda *x: jnp.stack(x), *params.blocks))


def test_answers_are_the_engines(place: Path) -> None:
    model = load(place / "model")
    answerer = _answerer(model, methods.ngram(drafts=3))
    found = answerer.answer("the quick", {"until": ["\n"], "max_gen_toks": 9, "do_sample": False})
    assert model.tokenizer is not None
    ids = tuple(model.tokenizer.encode("the quick"))
    (expected,) = generate(
        model,
        methods.autoregressive(),
        Prompt("0", token_ids=ids),
        max_new_tokens=9,
        stop=["\n"],
    )
    assert found == expected.text


@pytest.mark.slow
def test_tasks_from_the_command_line(place: Path) -> None:
    tasks = place / "tasks"
    tasks.mkdir()
    lines: list[dict[str, Any]] = [
        {"question": "the quick", "choices": ["brown", "dog"], "answer": 0},
        {"question": "a lazy", "choices": ["fox", "dog"], "answer": 1},
    ]
    data = tasks / "data.jsonl"
    data.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    choice = TASK.format(name="tiny_choice", data=data, kind="multiple_choice")
    choice += 'doc_to_choice: "{{choices}}"\ndoc_to_target: "{{answer}}"\n'
    choice += "metric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]\n"
    (tasks / "choice.yaml").write_text(choice, encoding="utf-8")
    spoken = TASK.format(name="tiny_spoken", data=data, kind="generate_until")
    spoken += 'doc_to_target: "{{choices[answer]}}"\n'
    spoken += 'generation_kwargs: {until: ["\\n"], max_gen_toks: 5, do_sample: false}\n'
    spoken += "metric_list: [{metric: exact_match, aggregation: mean, higher_is_better: true}]\n"
    (tasks / "spoken.yaml").write_text(spoken, encoding="utf-8")
    base: list[str | Path] = ["eval", "--model", place / "model", "--include", tasks]
    both = [*base, "--tasks", "tiny_choice,tiny_spoken"]
    cyclic = ["--method", "dmtd", "--option", "late=1", "--json"]
    found, table, unknown = run_commands(
        [
            [*both, *cyclic, "--baseline", place / "model"],
            [*both, "--limit", "1"],
            [*base, "--tasks", "tiny_chioce"],
        ]
    )
    assert found.code == 0, found.err
    report = json.loads(found.out)
    assert report["tasks"]["tiny_choice"].keys() == {"acc,none"}
    assert 0.0 <= report["tasks"]["tiny_spoken"]["exact_match,none"] <= 1.0
    assert "tasks" in report["retention"]
    model = load(place / "model")
    answerer = _answerer(model, methods.autoregressive())
    right = 0
    for line in lines:
        pairs = [(line["question"], f" {c}") for c in line["choices"]]
        scores = [score for score, _ in answerer.likelihoods(pairs)]
        right += int(np.argmax(scores)) == line["answer"]
    assert report["baseline"]["tasks"]["tiny_choice"]["acc,none"] == right / 2
    assert "tiny_choice" in table.out
    assert "no task 'tiny_chioce'" in assert_refused(unknown)
