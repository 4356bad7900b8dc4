"""`mtd distill-data`: the lines it writes, and that an interruption changes none of them."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from mtd_jax.cli import distill
from mtd_jax.cli.main import main
from mtd_jax.training.distill import Recipe, Task, answer, batches, make_plan
from mtd_jax.training.sources import read_documents
from tests.support import tiny
from tests.support.checkpoints import hf_config, write_hf
from tests.support.command_line import environment

PROMPTS = [{"id": f"p{i}", "token_ids": [5 + i, 6, 7, 8 + i] * (1 + i % 5)} for i in range(9)]
SHORT = ("--max-new-tokens", "6", "--batch-size", "2")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    base = tmp_path_factory.mktemp("model")
    source = write_hf(base / "hf", hf_config())
    assert main(["convert", "from-hf", str(source), str(base / "native")]) == 0
    return str(base / "native")


@pytest.fixture(scope="module")
def prompts(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("prompts") / "prompts.jsonl"
    path.write_text("\n".join(json.dumps(p) for p in PROMPTS))
    return str(path)


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MTD_CACHE_DIR", str(tmp_path / "cache"))


@pytest.fixture(scope="module")
def whole(model: str, prompts: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What a run that nothing disturbs writes."""
    out = tmp_path_factory.mktemp("whole") / "answers.jsonl"
    assert main(_argv(model, prompts, out)) == 0
    return out


def _argv(model: str, prompts: str, out: Path, *more: str) -> list[str]:
    argv = ["distill-data", "--model", model, "--prompts", prompts, "--out", str(out)]
    return [*argv, *SHORT, *more]


def _lines(path: Path) -> dict[str, Any]:
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert len({line["id"] for line in lines}) == len(lines)
    return {line["id"]: line for line in lines}


def test_lines_hold_prompt_and_answer(whole: Path, model: str, prompts: str) -> None:
    lines = _lines(whole)
    assert lines.keys() == {p["id"] for p in PROMPTS}
    for prompt in PROMPTS:
        line = lines[str(prompt["id"])]
        assert line["token_ids"][: line["prompt_tokens"]] == prompt["token_ids"]
        new = line["token_ids"][line["prompt_tokens"] :]
        assert 1 <= len(new) <= 6
        assert line["finish_reason"] == ("stop" if new[-1] == 2 else "length")
    assert {line["temperature"] for line in lines.values()} == {0.0, 0.7, 1.0}
    assert len({line["seed"] for line in lines.values()}) == len(PROMPTS)


def test_lines_are_read_as_training_text(whole: Path) -> None:
    lines = _lines(whole)
    found = {document.token_ids: document.answer for document in read_documents(whole)}
    assert found == {
        tuple(line["token_ids"]): tuple(
            i >= line["prompt_tokens"] for i in range(len(line["token_ids"]))
        )
        for line in lines.values()
    }


def test_answers_are_those_of_generate(
    whole: Path, model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """One prompt alone, with the temperature and seed that its line names."""
    drawn = next(line for line in _lines(whole).values() if line["temperature"] == 1.0)
    cut = drawn["prompt_tokens"]
    alone = tmp_path / "alone.jsonl"
    alone.write_text(json.dumps({"token_ids": drawn["token_ids"][:cut]}))
    argv = ["generate", "--model", model, "--prompts", str(alone), "--max-new-tokens", "6"]
    capsys.readouterr()
    assert main([*argv, "--temperature", "1", "--seed", str(drawn["seed"]), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)["outputs"][0]["token_ids"]
    assert found == drawn["token_ids"][cut:]


def test_drafting_writes_the_same(whole: Path, model: str, prompts: str, tmp_path: Path) -> None:
    out = tmp_path / "answers.jsonl"
    assert main(_argv(model, prompts, out, "--method", "ngram", "--option", "drafts=2")) == 0
    assert _lines(out) == _lines(whole)


@pytest.mark.parametrize("cut", [0, 1, 40])
def test_goes_on_where_it_was_interrupted(
    cut: int,
    whole: Path,
    model: str,
    prompts: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """`cut` bytes are missing at the end, as after a kill in the middle of a write."""
    out = tmp_path / "deep" / "answers.jsonl"
    calls = 0
    real = answer

    def interrupted(*args: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == 3:
            raise KeyboardInterrupt
        return real(*args)

    monkeypatch.setattr(distill, "answer", interrupted)
    assert main(_argv(model, prompts, out)) == 130
    assert f"4 of 9 answers are in {out}" in capsys.readouterr().err
    assert len(_lines(out)) == 4
    out.write_bytes(out.read_bytes()[: -cut or None])
    assert main([*_argv(model, prompts, out), "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert (report["answers"], report["there_before"]) == (9, 4 if cut == 0 else 3)
    assert _lines(out) == _lines(whole)
    calls = 2  # nothing is left to answer
    assert main(_argv(model, prompts, out)) == 0
    assert calls == 2


@pytest.mark.slow
def test_a_signal_leaves_whole_lines(model: str, prompts: str, tmp_path: Path) -> None:
    out = tmp_path / "answers.jsonl"
    argv = _argv(model, prompts, out)
    argv[argv.index("--max-new-tokens") + 1] = "200"
    code = "from mtd_jax.cli.main import script; script()"
    process = subprocess.Popen(
        [sys.executable, "-c", code, *argv], env=environment(), stderr=subprocess.PIPE, text=True
    )
    while process.poll() is None and not (out.exists() and out.stat().st_size):
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=120)
    # It may have been done already, on a fast machine.
    assert process.returncode in (0, 143), err
    assert "Traceback" not in err
    # The first lines may have been on their way to the disk.
    assert out.read_bytes()[-1:] in (b"\n", b"")
    assert main(argv) == 0
    assert len(_lines(out)) == 9


def test_other_settings_are_refused(
    whole: Path,
    model: str,
    prompts: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    out = tmp_path / "answers.jsonl"
    meta = out.with_name("answers.jsonl.meta.json")
    out.write_bytes(whole.read_bytes())
    assert main(_argv(model, prompts, out)) == 2
    assert "without a answers.jsonl.meta.json" in capsys.readouterr().err
    meta.write_bytes(whole.with_name(meta.name).read_bytes())
    for flags, said in (
        (("--temperatures", "0"), "temperatures [0.0, 0.7, 1.0], not [0.0]"),
        (("--seed", "1"), "seed 0, not 1"),
        (("--limit", "5"), "prompts"),
        (("--method", "ngram"), "method"),
    ):
        assert main(_argv(model, prompts, out, *flags)) == 2
        assert said in capsys.readouterr().err
    assert out.read_bytes() == whole.read_bytes()
    assert main(_argv(model, prompts, out, "--limit", "5", "--force")) == 0
    assert len(_lines(out)) == 5
    with out.open("a") as file:
        file.write('{"id": "p8"}\n')
    assert main(_argv(model, prompts, out, "--limit", "5")) == 2
    assert "line 6 is none of this run's" in capsys.readouterr().err


def test_samples_take_turns(model: str, prompts: str, tmp_path: Path) -> None:
    out = tmp_path / "answers.jsonl"
    assert main(_argv(model, prompts, out, "--samples", "3", "--limit", "3")) == 0
    lines = _lines(out)
    assert lines.keys() == {f"p{i}#{k}" for i in range(3) for k in range(3)}
    for i in range(3):
        turns = [lines[f"p{i}#{k}"]["temperature"] for k in range(3)]
        assert sorted(turns) == [0.0, 0.7, 1.0]


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (("--batch-size", "0"), "--batch-size must be at least 1"),
        (("--limit", "0"), "--limit must be at least 1"),
        (("--samples", "0"), "samples must be at least 1"),
        (("--samples", "4"), "greedy answer more than once"),
        (("--max-new-tokens", "0"), "max_new_tokens must be at least 1"),
        (("--max-prompt-tokens", "2"), "no prompt has at most 2 tokens"),
        (("--temperatures", "0,hot"), "takes numbers like"),
        (("--temperatures", "-1"), "temperature must be between"),
        (("--temperatures", "nan"), "finite"),
        (("--top-p", "0"), "top_p must be over 0"),
        (("--seed", "-1"), "seed must be"),
        (("--method", "ngran"), "did you mean 'ngram'"),
        (("--prompts", "none.jsonl"), "no prompts file"),
        (("--out", "{prompts}"), "the file of the prompts"),
        (("--out", "{directory}"), "cannot write"),
        (("--out", "/dev/null"), "no file that lines could be added to"),
        (("--outt", "x"), "did you mean '--out'"),
    ],
)
def test_refusals(
    flags: tuple[str, ...],
    said: str,
    model: str,
    prompts: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    flags = tuple(f.format(prompts=prompts, directory=tmp_path) for f in flags)
    capsys.readouterr()
    assert main([*_argv(model, prompts, tmp_path / "answers.jsonl"), *flags]) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("mtd: error: ")
    assert captured.err.count("\n") == 1
    assert said in captured.err
    assert not (tmp_path / "answers.jsonl").exists()


def test_two_runs_do_not_write_one_file(
    model: str, prompts: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from mtd_jax.cli.resumable import open_lines

    out = tmp_path / "answers.jsonl"
    with open_lines(out, {}, {"a"}, force=False) as lines:
        lines.append([{"id": "a"}])
        assert main(_argv(model, prompts, out)) == 2
        assert "another run is writing" in capsys.readouterr().err
    assert _lines(out) == {"a": {"id": "a"}}


def test_batches_hold_prompts_of_about_one_length() -> None:
    model = tiny.language_model()
    prompts = [{"id": str(i), "token_ids": [5] * (1 + 37 * i % 100)} for i in range(200)]
    from mtd_jax.decoding.requests import as_prompt

    plan = make_plan(
        model, [as_prompt(p, 0) for p in prompts], Recipe(max_prompt_tokens=90, seed=3)
    )
    assert plan.left_out == 20
    parts: list[list[Task]] = list(batches(plan.tasks, 2))
    assert sorted(task.id for part in parts for task in part) == sorted(t.id for t in plan.tasks)
    # The windows: 64 prompts each, sorted inside.
    first = [len(task.token_ids) for part in parts[:32] for task in part]
    assert first == sorted(first)
    assert {t.id for part in parts[:32] for t in part} == {t.id for t in plan.tasks[:64]}


def test_what_is_drawn_follows_from_the_id() -> None:
    """Not from the place in the file, nor from what else is asked."""
    from mtd_jax.decoding.requests import as_prompt

    model = tiny.language_model()
    prompts = [as_prompt({"id": f"x{i}", "token_ids": [5, 6]}, i) for i in range(300)]
    plan = make_plan(model, prompts, Recipe())
    backwards = make_plan(model, prompts[:100:-1], Recipe())
    known = {task.id: task for task in plan.tasks}
    assert all(known[task.id] == task for task in backwards.tasks)
    for temperature in (0.0, 0.7, 1.0):
        assert 70 < sum(t.sampling.temperature == temperature for t in plan.tasks) < 130
    assert make_plan(model, prompts, Recipe(seed=1)).tasks != plan.tasks
