"""Which tokens of a conversation the assistant wrote."""

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mtd_jax.errors import InputError
from mtd_jax.tokenizer import Encoding, Tokenizer
from mtd_jax.training.documents import Tokenized, covered, tokenize
from mtd_jax.training.sources import Document
from tests.support import tokenizers
from tests.support.real import model_directory

PATH = Path("chats.jsonl")
CHAT = (
    {"role": "user", "content": "What is 2 + 2?"},
    {"role": "assistant", "content": "It is 4.\n\nReally. 👩‍👩‍👧"},
    {"role": "user", "content": "<|bot|>Žluť"},
    {"role": "assistant", "content": " spaces "},
)


@functools.cache
def real() -> Tokenizer:
    return Tokenizer.load(model_directory())


def trimming(*, template: str | None) -> Tokenizer:
    """Spaces are left out of the spans, as by the tokenizer of Llama 3."""
    from tokenizers import processors

    tokenizer = tokenizers.byte_level(template=template)
    tokenizer._backend.post_processor = processors.ByteLevel(trim_offsets=True)
    return tokenizer


def chat(tokenizer: Tokenizer, *messages: dict[str, str]) -> Tokenized:
    (found,) = tokenize([Document(line=1, messages=messages)], tokenizer, PATH)
    return found


def stretches(tokenizer: Tokenizer, tokens: Tokenized) -> list[str]:
    """The text of each run of answer tokens."""
    edges = np.flatnonzero(np.diff(tokens.answer.astype(int), prepend=0, append=0))
    return [
        tokenizer.decode(tokens.ids[start:stop].tolist(), skip_special_tokens=False)
        for start, stop in edges.reshape(-1, 2)
    ]


MAKERS = [tokenizers.byte_level, tokenizers.byte_fallback, trimming]
KINDS = pytest.mark.parametrize("make", MAKERS)


def test_the_real_template() -> None:
    tokens = chat(real(), *CHAT)
    assert stretches(real(), tokens) == [
        "It is 4.\n\nReally. 👩‍👩‍👧<|im_end|>",
        " spaces <|im_end|>",
    ]
    text = real().decode(tokens.ids.tolist(), skip_special_tokens=False)
    assert text.startswith("<|im_start|>system\nYou are a helpful AI assistant named SmolLM")
    assert text.endswith(" spaces <|im_end|>\n")


def test_ids_are_those_of_the_whole_conversation_at_once() -> None:
    expected = real().chat(list(CHAT), add_generation_prompt=False)
    assert chat(real(), *CHAT).ids.tolist() == expected


def test_the_prompt_is_what_generation_starts_from() -> None:
    tokens = chat(real(), *CHAT)
    first = int(np.argmax(tokens.answer))
    assert tokens.ids[:first].tolist() == real().chat(list(CHAT[:1]))


@pytest.mark.parametrize("template", [tokenizers.TURNS, tokenizers.MARKED], ids=["plain", "marked"])
@KINDS
def test_answers_of_small_tokenizers(make: Callable[..., Tokenizer], template: str) -> None:
    tokenizer = make(template=template)
    conversation = tokenizer.conversation(CHAT)
    assert [conversation.text[start:stop] for start, stop in conversation.answers] == [
        "It is 4.\n\nReally. 👩‍👩‍👧</s>",
        " spaces </s>",
    ]
    tokens = chat(tokenizer, *CHAT)
    assert tokens.ids.tolist() == tokenizer.chat(list(CHAT), add_generation_prompt=False)
    end = tokenizer.eos_token_ids[0]
    # As many turns end in an answer as the assistant has; nothing behind its end token counts.
    ends = np.flatnonzero(tokens.ids == end)
    assert tokens.answer[ends].tolist() == [False, True, False, True]
    assert not tokens.answer[ends[[1, 3]] + 1].any()


@pytest.mark.parametrize("make", [tokenizers.byte_level, tokenizers.byte_fallback])
def test_marks_agree_with_transformers(make: Callable[..., Tokenizer]) -> None:
    tokenizer = make(template=tokenizers.MARKED)
    theirs = tokenizer._inner.apply_chat_template(
        list(CHAT), tokenize=True, return_dict=True, return_assistant_tokens_mask=True
    )
    ours = chat(tokenizer, *CHAT)
    assert ours.ids.tolist() == theirs["input_ids"]
    assert ours.answer.astype(int).tolist() == theirs["assistant_masks"]


def test_a_marked_space_is_learned_where_spans_leave_it_out() -> None:
    """transformers marks everything to the end of the text here; from 5.24 on a token too few."""
    template = tokenizers.MARKED.replace("</s>{% endgen", "</s> {% endgen")
    tokenizer = trimming(template=template)
    tokens = chat(tokenizer, *CHAT[1:3])
    assert stretches(tokenizer, tokens) == [f"{CHAT[1]['content']}</s> "]
    theirs = tokenizer._inner.apply_chat_template(
        list(CHAT[1:3]), tokenize=True, return_dict=True, return_assistant_tokens_mask=True
    )
    assert theirs["input_ids"] == tokens.ids.tolist()
    assert theirs["assistant_masks"] != tokens.answer.astype(int).tolist()


@settings(max_examples=60)
@given(turns=st.lists(st.text(max_size=12), min_size=2, max_size=5))
def test_any_text_is_found_again(turns: list[str]) -> None:
    """Also one that reads like the template itself."""
    roles = ["user", "assistant"] * 3
    messages = [{"role": r, "content": t} for r, t in zip(roles, turns, strict=False)]
    conversation = real().conversation(messages)
    found = [conversation.text[start:stop] for start, stop in conversation.answers]
    assert found == [f"{turn}<|im_end|>" for turn in turns[1::2]]


def test_a_template_without_an_end_token_ends_in_its_line_break() -> None:
    template = tokenizers.TURNS.replace("</s>", "")
    conversation = tokenizers.byte_level(template=template).conversation(CHAT[:2])
    ((start, stop),) = conversation.answers
    assert conversation.text[start:stop] == CHAT[1]["content"] + "\n"


def test_a_thought_before_the_last_answer_alone() -> None:
    """Qwen3's template: earlier turns are rendered without what the last one begins with."""
    thought = "{% if loop.last and m.role == 'assistant' %}<think>\n\n</think>\n\n{% endif %}"
    template = tokenizers.TURNS.replace("{{ m.content }}", thought + "{{ m.content }}")
    chat = (CHAT[0], {"role": "assistant", "content": " It is 4."}, *CHAT[2:])
    conversation = tokenizers.byte_level(template=template).conversation(chat)
    assert [conversation.text[start:stop] for start, stop in conversation.answers] == [
        " It is 4.</s>",
        f"<think>\n\n</think>\n\n{CHAT[3]['content']}</s>",
    ]


def test_plain_text_is_learned_whole_and_ends() -> None:
    ids, answer = tokenize([Document(line=1, text="Hello there")], real(), PATH)[0]
    assert ids.tolist() == [*real().encode("Hello there"), *real().eos_token_ids]
    assert answer.all()


def test_an_end_token_is_not_doubled() -> None:
    text = "Hello<|im_end|>"
    ids, _ = tokenize([Document(line=1, text=text)], real(), PATH)[0]
    assert ids.tolist() == real().encode(text)


def test_a_mixture_keeps_its_order() -> None:
    documents = [
        Document(line=1, text="a"),
        Document(line=2, token_ids=(5, 6, 7), answer=(False, True, True)),
        Document(line=3, messages=CHAT[:2]),
        Document(line=4, text="b"),
        Document(line=5, token_ids=(8, 9)),
    ]
    found = tokenize(documents, real(), PATH)
    alone = [tokenize([document], real(), PATH)[0] for document in documents]
    for a, b in zip(found, alone, strict=True):
        assert a.ids.tolist() == b.ids.tolist()
        assert a.answer.tolist() == b.answer.tolist()
    assert found[1].answer.tolist() == [False, True, True]
    assert found[4].answer.all()


def test_a_token_that_is_half_in_the_answer_counts() -> None:
    # The third is a space, which the tokenizer leaves out.
    encoding = Encoding(np.arange(4, dtype=np.int32), np.array([[0, 2], [2, 4], [5, 5], [5, 7]]))
    assert covered(encoding, [(3, 4)]).tolist() == [False, True, False, False]
    assert covered(encoding, [(3, 5)]).tolist() == [False, True, True, False]
    assert covered(encoding, [(5, 6)]).tolist() == [False, False, False, True]
    assert covered(encoding, [(0, 1), (6, 9)]).tolist() == [True, False, False, True]
    assert covered(encoding, []).tolist() == [False] * 4


@pytest.mark.parametrize(
    ("messages", "template", "message"),
    [
        (CHAT[:2], tokenizers.TEMPLATE, r"chats.jsonl, line 7: message 1: .*generation %} marks"),
        (CHAT[1:3], tokenizers.TURNS, "line 7: message 0: "),
        (({"role": "bad", "content": ""},), tokenizers.TEMPLATE, "line 7: .*no such role"),
        (({"role": "user"},), tokenizers.TURNS, "line 7: message 0 needs 'content' as text"),
        ((), tokenizers.TURNS, "line 7: messages must be a list"),
        (CHAT[:2], None, "line 7: the tokenizer has no chat template"),
        (({"role": "user", "content": "\ud800"},), tokenizers.TURNS, "line 7: .*surrogate"),
    ],
)
def test_conversations_that_cannot_be_used(
    messages: tuple[Any, ...], template: str | None, message: str
) -> None:
    tokenizer = tokenizers.byte_level(template=template)
    with pytest.raises(InputError, match=message) as caught:
        tokenize([Document(line=7, messages=messages)], tokenizer, PATH)
    assert "\n" not in str(caught.value)


def test_text_takes_a_tokenizer() -> None:
    with pytest.raises(InputError, match="line 3: text, but the model has no tokenizer"):
        tokenize([Document(line=3, text="a")], None, PATH)
    assert len(tokenize([Document(line=3, token_ids=(1,))], None, PATH)) == 1
