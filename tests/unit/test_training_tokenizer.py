"""A run is refused a tokenizer that cannot be its model's."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from mtd_jax.errors import InputError
from mtd_jax.training.config import DataConfig
from mtd_jax.training.data import Datasets, prepare
from tests.support import tiny, tokenizers


def prepared(path: Path, **changes: Any) -> Datasets:
    """A text by the tokenizer of the tests: 391 tokens, of which token 1 ends a text."""
    texts = path / "train.jsonl"
    texts.write_text('{"text": "a"}\n', encoding="utf-8")
    model = tiny.config(**{"vocab_size": 400, "eos_token_ids": (1,), **changes})
    data = DataConfig(train=(str(texts),), length=64)
    return prepare(data, tokenizers.byte_level(), model, seed=0, cache=path / "cache")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"vocab_size": 390}, "has 391 tokens, more than the model's vocabulary of 390"),
        ({"vocab_size": 783}, "has 391 tokens, less than half of the model's vocabulary of 783"),
        ({"eos_token_ids": (2, 3)}, r"ends a text with token 1, the model with 2 or 3 \(eos_"),
    ],
)
def test_another_models_tokenizer(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    """Its ids are all inside the vocabulary; nothing is tokenised before it is noticed."""
    with pytest.raises(InputError, match=message):
        prepared(tmp_path, **changes)
    assert not (tmp_path / "cache").exists()


@pytest.mark.parametrize("changes", [{}, {"vocab_size": 782}, {"eos_token_ids": ()}])
def test_its_own(tmp_path: Path, changes: dict[str, Any]) -> None:
    """Vocabularies may be padded, and a model need not say how a text ends."""
    assert prepared(tmp_path, **changes).train.statistics.documents == 1
