"""Conversations in a model's chat format, and which of their text the assistant wrote."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from mtd_jax.errors import InputError, first_line

# How a template itself says what the assistant writes (a tag that transformers adds to jinja).
_MARKS = re.compile(r"\{%-?\s*generation\s*-?%\}")


class Conversation(NamedTuple):
    """A conversation in a model's chat format."""

    text: str
    answers: tuple[tuple[int, int], ...]
    """Characters that the assistant wrote, from and to. The token that ends its turn is among them;
    a line break that the template puts behind that is not."""


def render(inner: Any, messages: Any, add_generation_prompt: bool) -> str:
    """Messages as text.

    Args:
      inner: a tokenizer of transformers.
      messages: a list of objects with `role` and `content`, both text, oldest first; comes from
        JSON files and requests, so everything about it is checked.
      add_generation_prompt: end with what opens the assistant's answer.

    Raises:
      InputError: no chat template, malformed messages, or the template refuses them.
    """
    if not inner.chat_template:
        raise InputError("the tokenizer has no chat template: give plain text instead")
    checked = _checked(messages)
    with _template_errors():
        text = inner.apply_chat_template(
            checked, add_generation_prompt=add_generation_prompt, tokenize=False
        )
    return str(text)


def conversation(inner: Any, messages: Any, special: Sequence[str]) -> Conversation:
    """A whole conversation as text, and which of it the assistant wrote.

    The template says so itself where it has `{% generation %}` marks. Otherwise an answer is what
    the text of the messages up to it has beyond the text of the messages before it with what opens
    an answer.

    Args:
      inner: a tokenizer of transformers.
      messages: as for `render`.
      special: special tokens, as text; one of them may end a turn.

    Raises:
      InputError: as for `render`; or the answers cannot be found, because the template renders the
        beginning of a conversation differently from the whole.
    """
    text = render(inner, messages, False)
    template = inner.get_chat_template()
    if _MARKS.search(template):
        return _marked(inner, _checked(messages), template)
    answers = (
        _answer(inner, messages, number, text, tuple(special))
        for number, message in enumerate(messages)
        if message["role"] == "assistant"
    )
    return Conversation(text, tuple(answers))


def _marked(inner: Any, messages: list[dict[str, Any]], template: str) -> Conversation:
    """A conversation whose template marks the answers."""
    # `apply_chat_template` gives a mask of tokens only, and a wrong one where an answer ends in a
    # space that the tokenizer leaves out of its spans: it then runs to the end of the text (5.23),
    # or ends before the space's token (5.24).
    from transformers.utils.chat_template_utils import render_jinja_template

    with _template_errors():
        rendered: Any = render_jinja_template(  # its own annotation is wrong
            conversations=[messages],
            chat_template=template,
            return_assistant_tokens_mask=True,
            add_generation_prompt=False,
            **inner.special_tokens_map,
        )
    (text,), (answers,) = rendered
    return Conversation(text, tuple((start, stop) for start, stop in answers))


def _answer(
    inner: Any, messages: Any, number: int, text: str, special: tuple[str, ...]
) -> tuple[int, int]:
    """Where in a conversation's text the answer of one message lies."""
    # transformers renders no empty list: an answer to nothing has nothing before it.
    before = render(inner, messages[:number], True) if number else ""
    after = text if number + 1 == len(messages) else render(inner, messages[: number + 1], False)
    if not before or not after.startswith(before) or not text.startswith(before):
        raise _lost(number)
    whole, content = after[len(before) :], messages[number]["content"]
    # Qwen3 puts an empty <think></think> before the last answer, and only there.
    bare = (whole[max(whole.rfind(said), 0) :] for said in (content, content.strip()))
    found = (answer for answer in (whole, *bare) if text.startswith(answer, len(before)))
    answer = next(found, None)
    if answer is None:
        raise _lost(number)
    # Generation ends with the token that ends the turn. Without one, a line break may do that.
    written = answer.rstrip()
    stop = len(before) + len(written if written.endswith(special) else answer)
    return len(before), stop


def _checked(messages: Any) -> list[dict[str, Any]]:
    if not isinstance(messages, list | tuple) or not messages:
        raise InputError("messages must be a list of objects with 'role' and 'content'")
    for number, message in enumerate(messages):
        if not isinstance(message, Mapping):
            raise InputError(f"message {number} must be an object with 'role' and 'content'")
        for key in ("role", "content"):
            if not isinstance(message.get(key), str):
                raise InputError(f"message {number} needs '{key}' as text")
    # Tables of messages hold a null for each key that another message has.
    return [{k: v for k, v in message.items() if v is not None} for message in messages]


@contextlib.contextmanager
def _template_errors() -> Iterator[None]:
    """What a chat template raises, as `InputError`."""
    from jinja2 import TemplateError

    try:
        yield
    except (TemplateError, TypeError, ValueError, KeyError, AttributeError) as error:
        raise InputError(
            f"the chat template refuses these messages: {first_line(error)}"
        ) from error


def _lost(number: int) -> InputError:
    return InputError(
        f"message {number}: which text is the assistant's cannot be told, for the chat template "
        "renders the beginning of a conversation differently from the whole; it needs "
        "{% generation %} marks"
    )
