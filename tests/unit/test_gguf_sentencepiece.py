"""SentencePiece vocabularies in GGUF files, against SentencePiece and transformers themselves."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mtd_jax.convert.conversions import to_native
from mtd_jax.convert.gguf_tokenizer import read_tokenizer
from mtd_jax.convert.load import load
from mtd_jax.errors import InputError
from mtd_jax.tokenizer import Tokenizer
from tests.support.checkpoints import hf_config, hf_tensors
from tests.support.gguf_files import write_gguf
from tests.support.tokenizers import TEMPLATE, TEXT

WORDS = "the then there therefore other others in inner  thin"
SPECIAL = ["<|user|>", "<|bot|>"]


@pytest.fixture(scope="module")
def trained() -> Any:
    """A byte-pair vocabulary with the options of Llama 2."""
    import sentencepiece as spm

    model = io.BytesIO()
    spm.SentencePieceTrainer.train(
        sentence_iterator=iter([TEXT[0], WORDS, TEXT[2]] * 3),
        model_writer=model,
        model_type="bpe",
        vocab_size=400,
        character_coverage=1.0,
        byte_fallback=True,
        split_digits=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        control_symbols=SPECIAL,
        minloglevel=2,
    )
    return spm.SentencePieceProcessor(model_proto=model.getvalue())


@pytest.fixture(scope="module")
def keys(trained: Any) -> dict[str, Any]:
    """What llama.cpp's converter writes of it."""
    count = trained.vocab_size()
    kinds = [(trained.is_unknown, 2), (trained.is_control, 3), (trained.is_byte, 6)]
    return {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.pre": "default",
        "tokenizer.ggml.tokens": [trained.id_to_piece(i) for i in range(count)],
        "tokenizer.ggml.scores": [float(trained.get_score(i)) for i in range(count)],
        "tokenizer.ggml.token_type": [
            next((kind for check, kind in kinds if check(i)), 1) for i in range(count)
        ],
        "tokenizer.ggml.unknown_token_id": trained.unk_id(),
        "tokenizer.chat_template": TEMPLATE,
    }


@pytest.fixture(scope="module")
def ours(keys: dict[str, Any]) -> Tokenizer:
    ends = {"tokenizer.ggml.bos_token_id": 1, "tokenizer.ggml.eos_token_id": 2}
    tokenizer = read_tokenizer(keys | ends)
    assert tokenizer is not None
    return tokenizer


@given(text=st.text(max_size=40) | st.text("the rin12 \n", max_size=60))
@settings(max_examples=500)
def test_ids_are_those_of_sentencepiece(trained: Any, ours: Tokenizer, text: str) -> None:
    _compare(trained, ours, text)


@pytest.mark.parametrize("text", [*TEXT, "", " ", "  the", "the  the ", "▁the", "<0x41> </s"])
def test_ids_of_odd_texts(trained: Any, ours: Tokenizer, text: str) -> None:
    _compare(trained, ours, text)


def _compare(trained: Any, ours: Tokenizer, text: str) -> None:
    ids = ours.encode(text)
    assert ids == [1, *trained.encode(text)]
    assert ours.decode(ids) == trained.decode(ids)


@pytest.mark.parametrize("text", [*TEXT, "the therefore", "a\n\nb"])
def test_ids_are_those_of_transformers(keys: dict[str, Any], ours: Tokenizer, text: str) -> None:
    from transformers import LlamaTokenizerFast
    from transformers.tokenization_utils_base import generate_merges

    tokens = keys["tokenizer.ggml.tokens"]
    vocabulary = {token: i for i, token in enumerate(tokens)}
    scores = dict(zip(tokens, keys["tokenizer.ggml.scores"], strict=True))
    kinds = dict(zip(tokens, keys["tokenizer.ggml.token_type"], strict=True))
    reference = LlamaTokenizerFast(
        vocab=vocabulary,
        merges=generate_merges(vocabulary, scores, skip_tokens=[t for t in tokens if kinds[t] > 1]),
        add_bos_token=True,
    )
    ids = ours.encode(text)
    assert ids == reference.encode(text)
    assert ours.decode(ids) == reference.decode(ids, skip_special_tokens=True)


def test_the_way_to_disk_and_chat(tmp_path: Path, keys: dict[str, Any]) -> None:
    config = hf_config(vocab_size=len(keys["tokenizer.ggml.tokens"]))
    path = write_gguf(tmp_path / "m.gguf", config, hf_tensors(config), extra=keys)
    to_native(path, tmp_path / "native")
    for place in (path, tmp_path / "native"):
        tokenizer = load(place).tokenizer
        assert tokenizer is not None
        assert tokenizer.vocab_size == config["vocab_size"]
        assert tokenizer.eos_token_ids == (2,)
        ids = tokenizer.chat([{"role": "user", "content": "the 你"}])
        assert (ids[0], ids[-2], ids[-1]) == (3, 2, 4)  # <|user|> ... </s> <|bot|>
        for text in TEXT:
            assert tokenizer.decode(tokenizer.encode(text)) == text


def test_without_a_space_before_the_text(trained: Any, keys: dict[str, Any]) -> None:
    tokenizer = read_tokenizer(
        keys | {"tokenizer.ggml.add_space_prefix": False, "tokenizer.ggml.add_bos_token": False}
    )
    assert tokenizer is not None
    assert trained.id_to_piece(tokenizer.encode("the")[0])[0] == "t"
    assert tokenizer.decode(tokenizer.encode(" the")) == " the"


@pytest.mark.parametrize("scores", [None, [1.0], ["a"] * 400])
def test_vocabularies_without_scores_are_refused(keys: dict[str, Any], scores: Any) -> None:
    with pytest.raises(InputError, match="scores"):
        read_tokenizer(keys | {"tokenizer.ggml.scores": scores})
