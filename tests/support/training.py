"""A tiny model on disk, texts for it, and runs of both."""

from __future__ import annotations

import json
import random
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from mtd_jax.cli.train import prepare_run
from mtd_jax.convert.conversions import save_native
from mtd_jax.decoding.language_model import LanguageModel
from mtd_jax.training.config import parse_config
from mtd_jax.training.log import read_log
from mtd_jax.training.loop import Outcome, Run, fit
from tests.support import tiny, tokenizers

LENGTH = 48
SIZES = {"num_heads": 8, "num_kv_heads": 4, "head_dim": 4, "intermediate_size": 64}
"""Eight devices divide these along any axis but the four key heads, which then stay whole."""
_TIMES = ("tokens_per_second", "mfu")
_WORDS = "the quick brown fox jumps over a lazy dog and then it sleeps for an hour or two".split()


def write_model(directory: Path, **changes: Any) -> Path:
    """A native checkpoint with a tokenizer; returns its directory."""
    tokenizer = tokenizers.byte_level(template=tokenizers.TURNS)
    own = {"vocab_size": tokenizer.vocab_size, "eos_token_ids": tokenizer.eos_token_ids}
    cfg = tiny.config(**{**own, "num_layers": 2, **changes})
    model = LanguageModel(
        params=tiny.params(cfg, scale=1.0),
        tokenizer=tokenizer,
        mesh=None,
        fingerprint="tiny-base",
        source="random",
    )
    save_native(model, directory / "model")
    return directory / "model"


def write_place(directory: Path, **changes: Any) -> Path:
    """A model, texts for it, and two prompts (prompts.jsonl); returns the directory."""
    write_model(directory, **changes)
    write_texts(directory)
    prompts = [{"id": str(i), "prompt": text} for i, text in enumerate(("the fox", "a lazy dog"))]
    lines = "".join(json.dumps(prompt) + "\n" for prompt in prompts)
    (directory / "prompts.jsonl").write_text(lines, encoding="utf-8")
    return directory


def write_texts(directory: Path, count: int = 60, seed: int = 0) -> Path:
    """Conversations and plain texts of different lengths; returns the file."""
    draw = random.Random(seed)
    lines: list[dict[str, Any]] = []
    for number in range(count):
        words = [draw.choice(_WORDS) for _ in range(draw.randint(3, 12))]
        if number % 3:
            half = len(words) // 2
            turns = [
                {"role": "user", "content": " ".join(words[:half])},
                {"role": "assistant", "content": " ".join(words[half:])},
            ]
            lines.append({"messages": turns})
        else:
            lines.append({"text": " ".join(words)})
    path = directory / f"texts-{seed}.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return path


def values(directory: Path, **changes: Any) -> dict[str, Any]:
    """A config as TOML would give it; `optimizer__steps=3` changes `optimizer.steps`."""
    found: dict[str, Any] = {
        "model": str(directory / "model"),
        "out": str(directory / "run"),
        "data": {
            "train": [str(directory / "texts-0.jsonl")],
            "held_out_fraction": 0.2,
            "length": LENGTH,
            "batch_size": 8,
            "cache": str(directory / "tokens"),
        },
        "optimizer": {"steps": 6, "learning_rate": 3e-3},
        "memory": {"loss_chunk": 64},
        "mesh": {"data": 1},
        "checkpoint": {"every": 3},
        "evaluate": {"every": 3, "batches": 2},
        "log": {"every": 2, "tensorboard": False},
    }
    for name, value in changes.items():
        table, _, key = name.rpartition("__")
        (found.setdefault(table, {}) if table else found)[key] = value
    return found


def write_config(directory: Path, name: str = "config.toml", **changes: Any) -> Path:
    """The same as a TOML file."""
    config = values(directory, **changes)
    lines = [f"{k} = {json.dumps(v)}" for k, v in config.items() if not isinstance(v, dict)]
    for table, inner in config.items():
        if isinstance(inner, dict):
            lines += [f"[{table}]", *[f"{k} = {json.dumps(v)}" for k, v in inner.items()]]
    path = directory / name
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def make_run(directory: Path, **changes: Any) -> Run:
    return prepare_run(parse_config(values(directory, **changes)))


def trained(directory: Path, **changes: Any) -> tuple[Outcome, list[dict[str, float]]]:
    """Runs to the end; the lines of the log without what depends on the clock."""
    run = make_run(directory, **changes)
    return fit(run), log_of(run.directory)


def log_of(directory: Path) -> list[dict[str, float]]:
    return [{k: v for k, v in line.items() if k not in _TIMES} for line in read_log(directory)]


def losses(log: list[dict[str, float]]) -> np.ndarray:
    return np.array([line["loss"] for line in log if "loss" in line])


def assert_same_bits(a: Any, b: Any) -> None:
    jax.tree.map(
        lambda x, y: np.testing.assert_array_equal(jax.device_get(x), jax.device_get(y)), a, b
    )


def settings(changes: Mapping[str, Any]) -> str:
    """How a test names a variant."""
    return "-".join(f"{key.rpartition('__')[2]}{value}" for key, value in changes.items())
