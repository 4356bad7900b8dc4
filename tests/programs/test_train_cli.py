"""`mtd train` as a user meets it: the dry look, a run, and every slip refused in one line."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from tests.support.command_line import assert_refused, printed_by, run_commands
from tests.support.training import write_config, write_model, write_texts


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("train-cli")
    write_model(directory)
    write_texts(directory)
    write_model(directory / "foreign", vocab_size=300)  # its tokenizer has 391
    (directory / "prompts.jsonl").write_text('{"id": "a", "prompt": "the fox"}\n', encoding="utf-8")
    files = {
        "broken.jsonl": '{"text": "fine"}\n{"text": \n',
        "empty.jsonl": "",
        "silent.jsonl": '{"messages": [{"role": "user", "content": "hello"}]}\n',
        "ids.jsonl": '{"token_ids": [1, 2, 100000]}\n',
    }
    for name, text in files.items():
        (directory / name).write_text(text, encoding="utf-8")
    return directory


# What is wrong -> what the line says.
SLIPS: dict[str, tuple[dict[str, Any], str]] = {
    "unknown key": ({"data__lenght": 3}, "unknown config key 'data.lenght' (did you mean"),
    "unknown table": ({"optimiser__steps": 3}, "(did you mean 'optimizer'?)"),
    "kind": ({"optimizer__steps": "ten"}, "optimizer.steps must be int, got 'ten'"),
    "choice": ({"optimizer__schedule": "cosin"}, "optimizer.schedule must be one of cosine,"),
    "range": ({"optimizer__warmup": 1.5}, "optimizer.warmup must be between 0 and 1"),
    "nan": ({"optimizer__learning_rate": -1.0}, "must be a number between 0"),
    "infinite": ({"optimizer__learning_rate": 1e39}, "must be a number between 0 and 3e+38"),
    "too many steps": ({"optimizer__steps": 2**31}, "optimizer.steps must be at most 2147483647"),
    "too large": ({"data__batch_size": 10**11}, "data.batch_size must be at most 1048576"),
    "zero byte": ({"data__cache": "a\0b"}, "data.cache holds a zero byte"),
    "no out": ({"out": ""}, "out names no directory"),
    "method": ({"method": "stf"}, "unknown method to train 'stf' (did you mean 'sft'?)"),
    "option": ({"options__rank": 2}, "unknown option of method 'sft' 'rank'"),
    "freeze": ({"freeze": ["blocks.qvk"]}, "unknown weight to freeze 'blocks.qvk'"),
    "too long": (
        {"data__length": 100_000},
        "data.length = 100000 is more than the model's context",
    ),
    "one token": ({"data__length": 1}, "data.length must be at least 2"),
    "parts": ({"data__accumulate": 3}, "data.accumulate = 3 does not divide data.batch_size = 8"),
    "no data": ({"data__train": []}, "data.train names no files"),
    "missing": ({"data__train": ["nowhere.jsonl"]}, "nowhere.jsonl"),
    "empty": ({"data__train": ["{place}/empty.jsonl"]}, "empty.jsonl"),
    "broken": ({"data__train": ["{place}/broken.jsonl"]}, "broken.jsonl, line 2"),
    "silent": ({"data__train": ["{place}/silent.jsonl"]}, "silent.jsonl, line 1"),
    "vocabulary": ({"data__train": ["{place}/ids.jsonl"]}, "outside the model's vocabulary"),
    "mesh": ({"mesh__data": 3}, "does not divide 1 devices"),
    "mesh axis": ({"mesh__tensor": 0}, "mesh.tensor must be at least 1"),
    "model": ({"model": "nowhere"}, "nowhere"),
    "tokenizer": ({"model": "{place}/foreign/model"}, "the tokenizer has 391 tokens, more than"),
    "seed": ({"seed": 2**40}, "seed must be less than 2^32"),
    "out": ({"out": "{place}/empty.jsonl"}, "is no directory"),
    "prompts": ({"evaluate__prompts": "nowhere.jsonl"}, "no prompts file at nowhere.jsonl"),
}


def test_slips_are_refused_in_one_line(place: Path) -> None:
    commands: list[list[str | Path]] = []
    for number, (changes, _) in enumerate(SLIPS.values()):
        filled = json.loads(json.dumps(changes).replace("{place}", str(place)))
        config = write_config(
            place, f"slip-{number}.toml", **{"out": str(place / "slip"), **filled}
        )
        commands.append(["train", config, "--dry-run"])
    outcomes = run_commands(commands)
    for (name, (_, words)), outcome in zip(SLIPS.items(), outcomes, strict=True):
        assert words in assert_refused(outcome), name
    assert not (place / "slip").exists()


def test_flags_are_checked(place: Path) -> None:
    config = write_config(place)
    (place / "no.toml").write_text("model = [", encoding="utf-8")
    commands: dict[str, list[str | Path]] = {
        "no config at": ["train", "nowhere.toml"],
        "is not TOML": ["train", place / "no.toml"],
        "--set takes key=value": ["train", config, "--set", "steps"],
        "unknown config key 'optimizer.step'": ["train", config, "--set", "optimizer.step=3"],
        "together": ["train", config, "--process-count", "2"],
        "HOST:PORT": [
            *("train", config, "--coordinator", "here", "--process-count", "2"),
            *("--process-index", "0"),
        ],
        "is not within": [
            *("train", config, "--coordinator", "here:1", "--process-count", "2"),
            *("--process-index", "2"),
        ],
    }
    for words, outcome in zip(commands, run_commands(list(commands.values())), strict=True):
        assert words in assert_refused(outcome)


def _renamed(place: Path) -> Path:
    """The model under another fingerprint, as another one of the same sizes has."""
    copy = place / "another-model"
    shutil.copytree(place / "model", copy)
    values = json.loads((copy / "config.json").read_text(encoding="utf-8"))
    (copy / "config.json").write_text(json.dumps({**values, "fingerprint": "0" * 64}))
    return copy


def test_a_run_from_the_dry_look_to_an_answer(place: Path) -> None:
    out = place / "run"
    config = write_config(
        place,
        "good.toml",
        out=str(out),
        evaluate__prompts=str(place / "prompts.jsonl"),
        evaluate__new_tokens=8,
        log__tensorboard=True,
    )
    another = _renamed(place)
    look, table, done, again, answer, behind, other, base = run_commands(
        [
            ["train", config, "--dry-run", "--json"],
            ["train", config, "--dry-run"],
            ["train", config, "--json"],
            ["train", config, "--json"],
            ["generate", "--model", out / "model", "--prompt", "the fox", "--max-new-tokens", "4"],
            ["train", config, "--dry-run"],
            ["train", config, "--dry-run", "--set", "seed=1"],
            ["train", config, "--dry-run", "--set", f"model={another}"],
        ]
    )
    assert [look.code, table.code, done.code, again.code, answer.code] == [0] * 5, done.err
    assert "goes on     behind step 6\n" in behind.out
    assert "made with seed = 0" in assert_refused(other)
    assert "is of another model" in assert_refused(base)
    report = json.loads(look.out)
    assert report["goes_on_behind_step"] is None
    assert report["batch"] == [8, 48]
    assert report["data"]["train"]["learned"] > 0
    memory = report["memory_per_device"]
    # Weights, two moments, a few scalars: 12 bytes a weight.
    assert 0 <= memory["state"] - 12 * report["trainable_parameters"] < 100
    assert memory["total"] > memory["state"]
    learned = "".join(piece["text"] for piece in report["sample"] if piece["learned"])
    assert "</s>" in learned
    assert "<|user|>" not in learned
    assert "¶" in table.out
    assert "[[" in table.out
    summary = json.loads(done.out)
    assert summary["finished"]
    assert summary["steps"] == 6
    assert json.loads(again.out) == summary  # a finished run stays finished
    lines = [json.loads(line) for line in (out / "log.jsonl").read_text("utf-8").splitlines()]
    assert any("held_out_decoded_as_before" in line for line in lines)
    assert any("mfu" in line for line in lines)
    assert list((out / "events").iterdir())
    assert (out / "loss.png").stat().st_size > 0


@pytest.mark.slow
def test_the_program_on_one_page(place: Path) -> None:
    words: list[str | Path] = [
        "--model",
        place / "model",
        "--data",
        place / "texts-0.jsonl",
        "--out",
        place / "page",
    ]
    assert "step 3" in printed_by("train.sft", *words, "--steps", "3", "--length", "48")
    assert (place / "page" / "config.json").is_file()
