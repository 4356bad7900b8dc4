"""The tokenizer and its stream: text that arrives in pieces is the text."""

import contextlib
import functools
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mtd_jax.errors import InputError
from mtd_jax.tokenizer import TextStream, Tokenizer
from tests.support import tokenizers
from tests.support.real import model_directory
from tests.support.vocabularies import (
    LLAMA2,
    sentencepiece_model,
    write_byte_level,
    write_sentencepiece,
)


@functools.cache
def real() -> Tokenizer:
    return Tokenizer.load(model_directory())


byte_level = functools.cache(tokenizers.byte_level)
byte_fallback = functools.cache(tokenizers.byte_fallback)
ALL = pytest.mark.parametrize("make", [byte_level, byte_fallback, real])


def streamed(tokenizer: Tokenizer, ids: list[int], sizes: list[int], skip: bool) -> list[str]:
    """The pieces that come out when `ids` go in, a few at a time."""
    stream = TextStream(tokenizer, skip_special_tokens=skip)
    pieces, start = [], 0
    for size in [*sizes, len(ids)]:
        pieces.append(stream.push(ids[start : start + size]))
        start += size
    return [*pieces, stream.flush()]


@ALL
@given(data=st.data())
@settings(max_examples=300)
def test_random_ids_stream_to_their_text(make: Callable[[], Tokenizer], data: Any) -> None:
    tokenizer = make()
    # Mostly few kinds of tokens: bytes and special ones are rare among 49152.
    few = st.integers(0, min(tokenizer.vocab_size, 300) - 1)
    ids = data.draw(st.lists(few | st.integers(0, tokenizer.vocab_size - 1), max_size=40))
    sizes = data.draw(st.lists(st.integers(0, 5), max_size=20))
    skip = data.draw(st.booleans())
    expected = tokenizer.decode(ids, skip_special_tokens=skip)
    assert "".join(streamed(tokenizer, ids, sizes, skip)) == expected


@ALL
@given(text=st.text(max_size=60), data=st.data())
@settings(max_examples=200)
def test_text_is_never_shown_broken(make: Callable[[], Tokenizer], text: str, data: Any) -> None:
    tokenizer = make()
    ids = tokenizer.encode(text)
    sizes = data.draw(st.lists(st.integers(0, 5), max_size=20))
    pieces = streamed(tokenizer, ids, sizes, True)
    whole = tokenizer.decode(ids)
    assert "".join(pieces) == whole
    assert "".join(pieces).count("\ufffd") == whole.count("\ufffd")


@ALL
def test_a_split_character_waits_for_its_last_byte(make: Callable[[], Tokenizer]) -> None:
    tokenizer = make()
    text = "a 👩‍👩‍👧 ñ 你 "
    stream = TextStream(tokenizer)
    out = ""
    for token in tokenizer.encode(text):
        out += stream.push([token])
        assert "\ufffd" not in out
    assert out + stream.flush() == tokenizer.decode(tokenizer.encode(text))


@ALL
def test_text_round_trips(make: Callable[[], Tokenizer]) -> None:
    tokenizer = make()
    for text in tokenizers.TEXT:
        assert tokenizer.decode(tokenizer.encode(text)) == text


@ALL
def test_a_token_costs_the_same_at_any_length(make: Callable[[], Tokenizer]) -> None:
    tokenizer = make()
    ids = tokenizer.encode("the quick fox " * 400)

    def seconds(repeat: int) -> float:
        stream = TextStream(tokenizer)
        start = time.perf_counter()
        for token in ids * repeat:
            stream.push([token])
        return time.perf_counter() - start

    seconds(1)
    assert seconds(8) < 8 * seconds(1) * 4


@ALL
def test_byte_tokens_and_special_tokens_without_end_stay_cheap(
    make: Callable[[], Tokenizer],
) -> None:
    tokenizer = make()
    eos = tokenizer.eos_token_ids[0]
    stream = TextStream(tokenizer)
    start = time.perf_counter()
    for _ in range(20_000):
        stream.push([eos])
    assert stream.flush() == ""
    assert time.perf_counter() - start < 5


def test_chat_follows_the_template() -> None:
    tokenizer = byte_level()
    ids = tokenizer.chat([{"role": "user", "content": "hi"}])
    assert tokenizer.decode(ids, skip_special_tokens=False) == "<|user|>hi</s><|bot|>"
    closed = tokenizer.chat([{"role": "user", "content": "hi"}], add_generation_prompt=False)
    assert ids[:-1] == closed


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ([], "must be a list"),
        ("hello", "must be a list"),
        ([["user", "hi"]], "message 0 must be an object"),
        ([{"role": "user"}], "message 0 needs 'content'"),
        ([{"role": "user", "content": "a"}, {"content": "b"}], "message 1 needs 'role'"),
        ([{"role": "user", "content": 3}], "needs 'content' as text"),
        ([{"role": "bad", "content": "x"}], "no such role"),
    ],
)
def test_malformed_messages_are_refused(messages: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        byte_level().chat(messages)


def test_no_template_is_said() -> None:
    plain = tokenizers.byte_level(template=None)
    assert not plain.has_chat_template
    with pytest.raises(InputError, match="no chat template"):
        plain.chat([{"role": "user", "content": "hi"}])


def test_half_a_surrogate_pair_is_refused() -> None:
    with pytest.raises(InputError, match="surrogate"):
        byte_level().encode("a\ud83d")


@pytest.mark.parametrize("make", [byte_level, byte_fallback])
def test_saved_and_loaded_is_the_same(make: Callable[[], Tokenizer], tmp_path: Path) -> None:
    tokenizer = make()
    tokenizer.save(tmp_path)
    again = Tokenizer.load(tmp_path)
    assert again.vocab_size == tokenizer.vocab_size
    assert again.eos_token_ids == tokenizer.eos_token_ids
    messages = [{"role": "user", "content": "the 你"}]
    assert again.chat(messages) == tokenizer.chat(messages)
    for text in tokenizers.TEXT:
        assert again.encode(text) == tokenizer.encode(text)


@pytest.mark.parametrize(
    "files",
    [
        {"tokenizer.json": "{"},
        {"tokenizer.json": "[]"},
        {"tokenizer.json": "{}"},
        {"tokenizer.model": "no sentencepiece"},
        {"tokenizer.json": "{}", "tokenizer_config.json": '{"tokenizer_class": "Nonsense"}'},
    ],
)
def test_broken_files_are_refused_in_one_line(tmp_path: Path, files: dict[str, str]) -> None:
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    with pytest.raises(InputError, match="cannot read the tokenizer") as caught:
        Tokenizer.load(tmp_path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("file", "place", "value"),
    [
        ("tokenizer_config.json", (), {"model_max_length": "8192"}),
        ("tokenizer.json", ("model",), {"continuing_subword_prefix": "a\0b"}),
    ],
)
def test_odd_values_are_refused_in_one_line(
    tmp_path: Path, file: str, place: tuple[str, ...], value: dict[str, str]
) -> None:
    byte_level().save(tmp_path)
    whole = json.loads((tmp_path / file).read_text())
    inner = whole
    for key in place:
        inner = inner[key]
    inner.update(value)
    (tmp_path / file).write_text(json.dumps(whole))
    with pytest.raises(InputError, match="cannot read the tokenizer") as caught:
        Tokenizer.load(tmp_path)
    assert "\n" not in str(caught.value)


def test_code_in_the_directory_is_never_run(tmp_path: Path) -> None:
    byte_level().save(tmp_path)
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    config |= {
        "tokenizer_class": "Evil",
        "auto_map": {"AutoTokenizer": ["evil.Evil", "evil.Evil"]},
    }
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    (tmp_path / "evil.py").write_text(f"open({str(tmp_path / 'run')!r}, 'w')\nclass Evil: pass\n")
    try:
        Tokenizer.load(tmp_path)
    except InputError:
        pass
    assert not (tmp_path / "run").exists()


def test_the_real_tokenizer_keeps_digits_apart() -> None:
    tokenizer = real()
    assert len(tokenizer.encode("12345")) == 5
    chat = tokenizer.chat([{"role": "user", "content": "Hi"}])
    assert chat[0] == 1
    assert tokenizer.decode(chat, skip_special_tokens=False).endswith("<|im_start|>assistant\n")
    assert tokenizer.eos_token_ids == (2,)
    assert tokenizer.vocab_size == 49152


_LLAMA, _QWEN = {"model_type": "llama"}, {"model_type": "qwen2"}
_ADDED = {"<|user|>": 400, "<|bot|>": 401}
DIRECTORIES: dict[str, Callable[[Path], Path]] = {
    "Llama 2": lambda d: write_sentencepiece(d, config=_LLAMA, tokenizer_config=LLAMA2),
    "fast": lambda d: write_sentencepiece(
        d, config=_LLAMA, tokenizer_config=LLAMA2 | {"tokenizer_class": "LlamaTokenizerFast"}
    ),
    "added tokens": lambda d: write_sentencepiece(
        d,
        config=_LLAMA,
        tokenizer_config=LLAMA2,
        added_tokens=_ADDED,
        special_tokens_map={"additional_special_tokens": [*_ADDED], "pad_token": "<unk>"},
    ),
    "class of the model": lambda d: write_sentencepiece(
        d, config=_LLAMA | {"tokenizer_class": "LlamaTokenizer"}
    ),
    "general class": lambda d: write_sentencepiece(
        d, config=_LLAMA, tokenizer_config=LLAMA2 | {"tokenizer_class": "PreTrainedTokenizerFast"}
    ),
    "no class": lambda d: write_sentencepiece(d, config=_LLAMA),
    "unigram": lambda d: write_sentencepiece(d, kind="unigram", config=_LLAMA),
    "Qwen2": lambda d: write_byte_level(
        d, config=_QWEN, tokenizer_config={"tokenizer_class": "Qwen2Tokenizer"}
    ),
    "Qwen2 by its model": lambda d: write_byte_level(d, config=_QWEN),
    "GPT-2's in a Llama": lambda d: write_byte_level(
        d, config=_LLAMA, tokenizer_config={"tokenizer_class": "GPT2Tokenizer"}
    ),
}
SPACES = ["", " ", "  the", "the  the ", "in\nthe", "<s>the</s> in", "▁the", "<|user|>the<|bot|>"]


@pytest.mark.torch
@pytest.mark.parametrize("name", DIRECTORIES)
def test_without_a_tokenizer_json_as_transformers_reads_it(tmp_path: Path, name: str) -> None:
    from transformers import AutoTokenizer  # imports torch

    directory = DIRECTORIES[name](tmp_path / "tokenizer")
    ours = Tokenizer.load(directory)
    theirs = AutoTokenizer.from_pretrained(str(directory), local_files_only=True)
    for text in (*tokenizers.TEXT, *SPACES):
        ids = ours.encode(text)
        assert ids == theirs.encode(text)
        assert ours.decode(ids) == theirs.decode(ids, skip_special_tokens=True)
    assert ours.fingerprint() == Tokenizer(theirs).fingerprint()


@pytest.mark.parametrize("model_type", ["llama", "mistral"])
def test_a_tokenizer_model_gives_the_ids_of_sentencepiece(tmp_path: Path, model_type: str) -> None:
    """AutoTokenizer reads a Mistral's with the general class, and loses the space before it."""
    import sentencepiece

    theirs = sentencepiece.SentencePieceProcessor(model_proto=sentencepiece_model())
    directory = write_sentencepiece(
        tmp_path / "tokenizer", config={"model_type": model_type}, tokenizer_config=LLAMA2
    )
    ours = Tokenizer.load(directory)
    # transformers puts no second space before a text that begins with one.
    plain = [text for text in SPACES if not text.startswith((" ", "▁", "<"))]
    for text in (*tokenizers.TEXT, *plain):
        assert ours.encode(text) == [1, *theirs.encode(text)]


def test_a_tokenizer_class_that_is_none_is_not_looked_for(tmp_path: Path) -> None:
    for number, name in enumerate(["Nonsense", "Trainer", "BertTokenizer", 3]):
        directory = write_sentencepiece(
            tmp_path / str(number), tokenizer_config={"tokenizer_class": name}
        )
        with contextlib.suppress(InputError):
            assert Tokenizer.load(directory).encode("the")
