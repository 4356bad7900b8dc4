"""Directories without a tokenizer.json: a vocabulary, and a class that a config names."""

from __future__ import annotations

import functools
import io
import json
from pathlib import Path
from typing import Any

from tests.support.tokenizers import TEXT, byte_level

LLAMA2 = {
    "tokenizer_class": "LlamaTokenizer",
    "add_bos_token": True,
    "add_eos_token": False,
    "bos_token": {"__type": "AddedToken", "content": "<s>", "normalized": False},
    "eos_token": {"__type": "AddedToken", "content": "</s>", "normalized": False},
    "unk_token": {"__type": "AddedToken", "content": "<unk>", "normalized": False},
    "pad_token": None,
    "legacy": False,
}
"""tokenizer_config.json as Llama 2 and Vicuna have it."""


@functools.cache
def sentencepiece_model(kind: str = "bpe") -> bytes:
    """A tokenizer.model with Llama 2's options (`kind` bpe), or a unigram one of 100 or so."""
    import sentencepiece

    model = io.BytesIO()
    options: dict[str, Any] = {"vocab_size": 120, "hard_vocab_limit": False}
    if kind == "bpe":
        options = {"vocab_size": 400, "byte_fallback": True, "split_digits": True}
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([*TEXT, "the then there  other  in inner"] * 3),
        model_writer=model,
        model_type=kind,
        character_coverage=1.0,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        minloglevel=2,
        **options,
    )
    return model.getvalue()


def write_sentencepiece(directory: Path, *, kind: str = "bpe", **files: dict[str, Any]) -> Path:
    """A tokenizer.model, and beside it JSON files by their stems."""
    directory.mkdir(parents=True)
    (directory / "tokenizer.model").write_bytes(sentencepiece_model(kind))
    return _with_json(directory, files)


def write_byte_level(directory: Path, **files: dict[str, Any]) -> Path:
    """A vocab.json with merges.txt, as GPT-2 and Qwen2 have them, and JSON files by their stems."""
    directory.mkdir(parents=True)
    model = json.loads(byte_level()._backend.to_str())["model"]
    (directory / "merges.txt").write_text("\n".join(" ".join(pair) for pair in model["merges"]))
    return _with_json(directory, {"vocab": model["vocab"], **files})


def _with_json(directory: Path, files: dict[str, dict[str, Any]]) -> Path:
    for name, values in files.items():
        (directory / f"{name}.json").write_text(json.dumps(values))
    return directory
