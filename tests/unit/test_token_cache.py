"""Tokens on disk are the tokens, and those of another file or tokenizer are never taken."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mtd_jax.errors import InputError
from mtd_jax.tokenizer import Tokenizer
from mtd_jax.training import token_cache
from mtd_jax.training.documents import tokenize
from mtd_jax.training.sources import read_documents
from mtd_jax.training.token_cache import Tokens, load_tokens
from tests.support import tokenizers

Load = Callable[..., Tokens]


@pytest.fixture
def tokenizer() -> Tokenizer:
    return tokenizers.byte_level(template=tokenizers.TURNS)


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many documents were tokenised, call by call."""
    found: list[int] = []

    def counting(documents: Any, *rest: Any) -> Any:
        found.append(len(documents))
        return tokenize(documents, *rest)

    monkeypatch.setattr(token_cache, "tokenize", counting)
    return found


def write(path: Path, texts: list[str]) -> Path:
    path.write_text("".join(json.dumps({"text": text}) + "\n\n" for text in texts))
    return path


def load(path: Path, tokenizer: Tokenizer) -> Tokens:
    return load_tokens(path, tokenizer, tokenizer.fingerprint(), path.parent / "cache")


def arrays(tokens: Tokens) -> list[list[int]]:
    found = (tokens.ids, tokens.answer, tokens.offsets, tokens.lines)
    return [array.tolist() for array in found]


def test_a_second_run_reads_the_same_arrays(
    tmp_path: Path, tokenizer: Tokenizer, calls: list[int]
) -> None:
    path = write(tmp_path / "a.jsonl", [f"document {i}" for i in range(token_cache._TOGETHER + 3)])
    first, second = load(path, tokenizer), load(path, tokenizer)
    assert calls == [token_cache._TOGETHER, 3]
    assert arrays(first) == arrays(second)
    assert isinstance(second.ids, np.memmap)
    assert second.ids.dtype == np.uint16
    expected = tokenize(list(read_documents(path)), tokenizer, path)
    assert second.ids.tolist() == [i for tokens in expected for i in tokens.ids]
    assert second.place(2) == f"{path}, line 5"
    assert [entry.name for entry in (tmp_path / "cache").iterdir()] == [
        entry.name for entry in (tmp_path / "cache").glob("[0-9a-f]*")
    ]


def test_a_changed_file_is_tokenised_again(
    tmp_path: Path, tokenizer: Tokenizer, calls: list[int]
) -> None:
    before = load(write(tmp_path / "a.jsonl", ["one", "two"]), tokenizer)
    after = load(write(tmp_path / "a.jsonl", ["one", "tow"]), tokenizer)
    assert len(calls) == 2
    assert arrays(before) != arrays(after)


def test_another_tokenizer_has_tokens_of_its_own(tmp_path: Path, calls: list[int]) -> None:
    path = write(tmp_path / "a.jsonl", ["one", "two"])
    makers = [
        tokenizers.byte_level(),
        tokenizers.byte_level(template=tokenizers.TURNS),
        tokenizers.byte_fallback(),
    ]
    for tokenizer in makers:
        load(path, tokenizer)
    assert len(calls) == 3
    assert len(list((tmp_path / "cache").iterdir())) == 3


def test_a_fingerprint_does_not_change_with_use(tokenizer: Tokenizer) -> None:
    before = tokenizer.fingerprint()
    tokenizer._backend.enable_truncation(7)
    assert tokenizer.fingerprint() == before
    tokenizer.encode_all(["a", "b"])
    assert tokenizer.fingerprint() == before


@pytest.mark.parametrize("name", token_cache._NAMES)
def test_what_a_crash_cut_short_is_made_again(
    tmp_path: Path, tokenizer: Tokenizer, calls: list[int], name: str
) -> None:
    path = write(tmp_path / "a.jsonl", ["one", "two"])
    whole = arrays(load(path, tokenizer))
    (entry,) = (tmp_path / "cache").iterdir()
    for size in (0, 60, (entry / f"{name}.npy").stat().st_size - 1):
        content = (entry / f"{name}.npy").read_bytes()
        (entry / f"{name}.npy").write_bytes(content[:size])
        assert arrays(load(path, tokenizer)) == whole
    assert len(calls) == 4


def test_another_process_may_be_faster(
    tmp_path: Path, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write(tmp_path / "a.jsonl", ["one", "two"])

    def slower(*given: Any) -> Any:
        monkeypatch.setattr(token_cache, "tokenize", tokenize)
        load(path, tokenizer)
        return tokenize(*given)

    monkeypatch.setattr(token_cache, "tokenize", slower)
    found = arrays(load(path, tokenizer))
    assert found == arrays(load(path, tokenizer))
    assert len(list((tmp_path / "cache").iterdir())) == 1


def test_large_ids_are_wide(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    lines = ({"token_ids": ids} for ids in ([1, 2], [3, 2**16], [4]))
    path.write_text("\n".join(map(json.dumps, lines)))
    tokens = load_tokens(path, None, "", tmp_path / "cache")
    assert tokens.ids.dtype == np.uint32
    assert tokens.ids.tolist() == [1, 2, 3, 2**16, 4]
    assert tokens.offsets.tolist() == [0, 2, 4, 5]


@pytest.mark.parametrize("content", ["", "\n\n"])
def test_an_empty_file_is_refused(tmp_path: Path, tokenizer: Tokenizer, content: str) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text(content)
    with pytest.raises(InputError, match=r"a\.jsonl holds no document"):
        load(path, tokenizer)
    assert not (tmp_path / "cache").exists()


def test_a_cache_that_cannot_be_written(tmp_path: Path, tokenizer: Tokenizer) -> None:
    path = write(tmp_path / "a.jsonl", ["one"])
    (tmp_path / "cache").write_text("a file")
    with pytest.raises(InputError, match=r"cannot write tokens to .*cache: .*data.cache names"):
        load(path, tokenizer)
