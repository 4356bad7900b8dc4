"""Prompts as users give them, checked and turned into token ids."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np

from mtd_jax.config import ModelConfig
from mtd_jax.decoding.sampling import Sampling
from mtd_jax.errors import InputError, nearest
from mtd_jax.tokenizer import Tokenizer, check_text
from mtd_jax.typing import is_whole

Message: TypeAlias = Mapping[str, str]
DEFAULT_NEW_TOKENS = 256
_SAMPLING_KEYS = (*(field.name for field in dataclasses.fields(Sampling)), "stop")
# What other engines take; a request that asks for it must not be answered as if it had not.
_NOT_OFFERED = (
    "best_of",
    "grammar",
    "guided_json",
    "ignore_eos",
    "length_penalty",
    "logit_bias",
    "logprobs",
    "n",
    "no_repeat_ngram_size",
    "num_beams",
    "response_format",
    "system",
    "tools",
    "typical_p",
)
_LINE_KEYS = ("id", "prompt", "messages", "token_ids", "max_new_tokens", "category", "cycle")


@dataclasses.dataclass(frozen=True)
class Prompt:
    """One request: exactly one of `text`, `messages` and `token_ids`."""

    id: str
    text: str | None = None
    messages: tuple[Message, ...] | None = None
    """Chat turns, `{"role": ..., "content": ...}` each."""
    token_ids: tuple[int, ...] | None = None
    max_new_tokens: int | None = None
    """None: what the whole call asks for."""
    category: str | None = None
    """What kind of prompt it is, for reports."""
    cycle: int | None = None
    """Tokens of a cycle, for `dmtd`: at most the method's own, which None is."""
    seed: int | None = None
    """Of this prompt's draws; None: that of the call's sampling."""

    def __post_init__(self) -> None:
        given = [x for x in (self.text, self.messages, self.token_ids) if x is not None]
        if len(given) != 1:
            raise InputError(f"prompt {self.id}: give one of prompt, messages or token_ids")
        if self.seed is not None:
            Sampling(seed=self.seed)  # refuses what it would refuse of a flag


AnyPrompt: TypeAlias = (
    str | Prompt | Mapping[str, Any] | Sequence[int] | Sequence[np.integer] | np.ndarray
)


@dataclasses.dataclass(frozen=True)
class EncodedPrompt:
    """A prompt ready for the engine."""

    id: str
    token_ids: tuple[int, ...]
    budget: int
    """New tokens to produce at most."""
    ends_at_context: bool
    """`budget` is what the context has left, less than was asked for."""
    cycle: int = 0
    """Tokens of a cycle; 0 is the method's own."""
    seed: int | None = None

    def sampling(self, asked: Sampling) -> Sampling:
        """What the call asks for, with the prompt's own seed if it has one."""
        return asked if self.seed is None else dataclasses.replace(asked, seed=self.seed)


def as_prompt(value: AnyPrompt, index: int) -> Prompt:
    """A `Prompt` from text, token ids, or an object as in a prompts file.

    Raises:
      InputError: an unknown key, a missing or a misshapen one.
    """
    if isinstance(value, Prompt):
        return value
    if isinstance(value, str):
        return Prompt(id=str(index), text=value)
    if isinstance(value, Mapping):
        return _from_object(value, index)
    if not isinstance(value, Sequence | np.ndarray):
        raise InputError(f"prompt {index} is neither text, token ids nor an object: {value!r}")
    ids: list[Any] = [i.item() if isinstance(i, np.integer) else i for i in value]
    return Prompt(id=str(index), token_ids=tuple(ids))


def without_cycles(prompts: Sequence[Prompt]) -> list[Prompt]:
    """The same prompts for a method that has no cycles, to compare with one that has."""
    return [dataclasses.replace(prompt, cycle=None) for prompt in prompts]


def read_prompts(path: str | Path) -> list[Prompt]:
    """The prompts of a JSON-lines file, one object a line (see `mtd generate --help`).

    Raises:
      InputError: the file cannot be read, is empty, or a line is wrong (its number is named).
    """
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise InputError(f"no prompts file at {path}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"cannot read prompts file {path}: {error}") from None
    prompts: list[Prompt] = []
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            value = json.loads(line, object_pairs_hook=_unique)
            if not isinstance(value, dict):
                raise InputError("not a JSON object")
            prompts.append(_from_object(value, len(prompts)))
        except (ValueError, RecursionError) as error:
            raise InputError(f"{path}, line {number}: {error}") from None
    if not prompts:
        raise InputError(f"{path} holds no prompt")
    return prompts


def encode(
    prompt: Prompt,
    config: ModelConfig,
    tokenizer: Tokenizer | None,
    *,
    max_new_tokens: int,
    chat: bool | None,
) -> EncodedPrompt:
    """Token ids and budget of a prompt.

    Args:
      chat: wrap plain text as one user turn of the chat template; None does so if there is one.

    Raises:
      InputError: an empty prompt, an id outside the vocabulary, a prompt that leaves no room in the
        context, a budget under 1, or text without a tokenizer.
    """
    ids = prompt_token_ids(prompt, tokenizer, chat)
    if not ids:
        raise InputError(f"prompt {prompt.id} is empty")
    for token in ids:
        if not is_whole(token):
            raise InputError(f"prompt {prompt.id}: token id {token!r} is not a whole number")
        if not 0 <= token < config.vocab_size:
            raise InputError(
                f"prompt {prompt.id}: token id {token} is outside 0..{config.vocab_size - 1}"
            )
    room = config.context_length - len(ids)
    if room < 1:
        raise InputError(
            f"prompt {prompt.id} has {len(ids)} tokens, the context of {config.context_length} "
            "leaves no room for an answer"
        )
    wanted = max_new_tokens if prompt.max_new_tokens is None else prompt.max_new_tokens
    if not is_whole(wanted) or wanted < 1:
        raise InputError(f"max_new_tokens must be a whole number of at least 1, got {wanted!r}")
    if prompt.cycle is not None and not (is_whole(prompt.cycle) and prompt.cycle >= 1):
        raise InputError(f"prompt {prompt.id}: cycle must be at least 1, got {prompt.cycle!r}")
    return EncodedPrompt(
        id=prompt.id,
        token_ids=ids,
        budget=min(wanted, room),
        ends_at_context=room < wanted,
        cycle=prompt.cycle or 0,
        seed=prompt.seed,
    )


def prompt_token_ids(
    prompt: Prompt, tokenizer: Tokenizer | None, chat: bool | None
) -> tuple[int, ...]:
    """The token ids alone, without a look at the context; see `encode`.

    Raises:
      InputError: text without a tokenizer, or messages that the chat template refuses.
    """
    if prompt.token_ids is not None:
        return prompt.token_ids
    if tokenizer is None:
        raise InputError(
            f"prompt {prompt.id} is text, but the model has no tokenizer: give token_ids"
        )
    if prompt.messages is not None:
        return tuple(tokenizer.chat(prompt.messages))
    assert prompt.text is not None  # Prompt holds exactly one of the three
    if not prompt.text:
        return ()
    if tokenizer.has_chat_template if chat is None else chat:
        return tuple(tokenizer.chat([{"role": "user", "content": prompt.text}]))
    return tuple(tokenizer.encode(prompt.text))


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """The object of a line; Python's json takes the last of several values silently."""
    found: dict[str, Any] = {}
    for key, value in pairs:
        if key in found:
            raise InputError(f"the key '{key[:100]}' is given twice")
        found[key] = value
    return found


def _name(value: Any) -> str:
    """Text to print and to sort by, whatever a line has there."""
    name = str(value)
    check_text(name)
    return name


def _from_object(value: Mapping[str, Any], index: int) -> Prompt:
    for key in value:
        if key == "seed":  # the only one of a prompt's own; too short to look for slips of
            continue
        if key in _SAMPLING_KEYS:
            flag = key.replace("_", "-")
            raise InputError(f"'{key}' is no key of a prompt: sampling is set by flags (--{flag})")
        if key in _NOT_OFFERED:
            raise InputError(f"'{key}' is not offered")
        # Files carry notes of their own; only what looks like a slip of the pen is refused.
        slip = nearest(str(key), _LINE_KEYS) or nearest(str(key), _SAMPLING_KEYS, cutoff=0.8)
        if key not in _LINE_KEYS and slip:
            raise InputError(f"unknown key '{key}'{slip}")
    text, messages, ids = value.get("prompt"), value.get("messages"), value.get("token_ids")
    budget, cycle, seed = (value.get(key) for key in ("max_new_tokens", "cycle", "seed"))
    if text is not None and not isinstance(text, str):
        raise InputError("'prompt' must be text")
    if messages is not None and not isinstance(messages, list | tuple):
        raise InputError("'messages' must be a list of {role, content} objects")
    if ids is not None and not isinstance(ids, list | tuple):
        raise InputError("'token_ids' must be a list of whole numbers")
    for number in [*(ids or ()), *(n for n in (budget, cycle, seed) if n is not None)]:
        if not is_whole(number):
            raise InputError(f"{number!r} is not a whole number")
    return Prompt(
        id=_name(value.get("id", index)),
        text=text,
        messages=None if messages is None else tuple(messages),
        token_ids=None if ids is None else tuple(ids),
        max_new_tokens=budget,
        category=None if value.get("category") is None else _name(value["category"]),
        cycle=cycle,
        seed=seed,
    )
