"""Text to token ids and back, whole or as a stream.

A thin wrapper around a tokenizer of transformers, read from a local directory only. transformers is
imported when the first tokenizer is loaded: it takes 0.3 to 0.5 s. Its AutoTokenizer would import
torch too wherever that is installed, 2 s, so the class is chosen here.
"""

from __future__ import annotations

import codecs
import contextlib
import hashlib
import json
import logging
import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from mtd_jax import chat_template
from mtd_jax.chat_template import Conversation
from mtd_jax.errors import InputError, first_line

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "tokenizer.model",
    "chat_template.jinja",
    "chat_template.json",
)
"""What a directory may hold of a tokenizer; conversions copy these."""

# Tokens that together may still be one character; more than that are broken text.
_LONGEST_CHARACTER = 16
# What the tokenizers library raises where its Rust code gives up: no Exception.
_PANIC = "PanicException"
_VOCABULARIES = ("tokenizer.json", "tokenizer.model", "vocab.json")
# Where no config names a class.
_CLASSES = {"qwen2": "Qwen2Tokenizer", "qwen3": "Qwen2Tokenizer"}


class Encoding(NamedTuple):
    """The tokens of a text."""

    ids: np.ndarray
    """[n] int32"""
    spans: np.ndarray
    """[n, 2] int32: characters of the text that a token covers, from and to. Some tokenizers leave
    spaces out of them, so that a token of nothing else covers none."""


class Tokenizer:
    """The tokenizer of one model."""

    def __init__(self, inner: Any) -> None:
        """Wraps a `transformers` tokenizer that has a `tokenizers` backend."""
        self._inner = inner
        self._backend = inner.backend_tokenizer
        self.pieces = TokenPieces(self._backend)

    @classmethod
    def load(cls, directory: str | os.PathLike[str]) -> Tokenizer:
        """The tokenizer in a directory; code that may lie in there is never run.

        Raises:
          InputError: there is none, or its files cannot be understood.
        """
        directory = Path(directory)
        if not has_tokenizer(directory):
            raise InputError(f"{directory} holds no tokenizer")
        # Without torch, transformers advises to install it; and its progress notes are not ours.
        os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
        try:
            with _held_log():
                loader = _class_for(directory)
                inner = loader.from_pretrained(
                    str(directory), local_files_only=True, trust_remote_code=False
                )
                if not isinstance(inner.model_max_length, int | float):
                    raise InputError(f"model_max_length = {inner.model_max_length!r} is no number")
                return cls(inner)
        except BaseException as error:  # its loaders raise almost every type on a malformed file
            if not isinstance(error, Exception) and type(error).__name__ != _PANIC:
                raise
            raise InputError(
                f"cannot read the tokenizer in {directory}: {first_line(error)}"
            ) from error

    @property
    def vocab_size(self) -> int:
        """Number of tokens, added ones included."""
        return int(self._backend.get_vocab_size(with_added_tokens=True))

    @property
    def eos_token_ids(self) -> tuple[int, ...]:
        """The token that ends a text, if there is one."""
        eos = self._inner.eos_token_id
        return () if eos is None else (int(eos),)

    @property
    def has_chat_template(self) -> bool:
        """Whether `chat` can be used."""
        return bool(self._inner.chat_template)

    def encode(self, text: str) -> list[int]:
        """The ids of a text, with the special tokens that the tokenizer itself puts around it."""
        if not isinstance(text, str):
            raise InputError(f"a prompt must be text, got {type(text).__name__}")
        check_text(text)
        return [int(i) for i in self._inner.encode(text, verbose=False)]

    def chat(self, messages: Any, *, add_generation_prompt: bool = True) -> list[int]:
        """The ids of a conversation in the model's chat format.

        Args:
          messages: a list of objects with `role` and `content`, both text, oldest first; comes from
            JSON files and requests, so everything about it is checked.
          add_generation_prompt: end with what opens the assistant's answer.

        Raises:
          InputError: no chat template, malformed messages, or the template refuses them.
        """
        text = self.chat_text(messages, add_generation_prompt=add_generation_prompt)
        check_text(text)
        return [int(i) for i in self._inner.encode(text, add_special_tokens=False, verbose=False)]

    def chat_text(self, messages: Any, *, add_generation_prompt: bool = True) -> str:
        """The conversation as text, special tokens written out; arguments as for `chat`."""
        return chat_template.render(self._inner, messages, add_generation_prompt)

    def encode_all(
        self, texts: Sequence[str], *, add_special_tokens: bool = True
    ) -> list[Encoding]:
        """What `encode` gives for each of many texts, several at a time, and where the tokens lie.

        Args:
          add_special_tokens: False for text of a chat template, which writes them out.
        """
        for text in texts:
            check_text(text)
        if not texts:
            return []
        found = self._inner(list(texts), add_special_tokens=add_special_tokens, verbose=False)
        return [
            Encoding(np.array(e.ids, np.int32), np.array(e.offsets, np.int32).reshape(-1, 2))
            for e in found.encodings
        ]

    def conversation(self, messages: Any) -> Conversation:
        """A whole conversation as text, and which of it the assistant wrote.

        Args:
          messages: as for `chat`.

        Raises:
          InputError: as for `chat`; or the template does not show which text is the assistant's.
        """
        return chat_template.conversation(self._inner, messages, self.pieces.special_texts)

    def fingerprint(self) -> str:
        """Tells apart tokenizers that may give different tokens for the same text or messages."""
        backend = json.loads(self._backend.to_str())
        # Left behind by whoever encoded last; each call sets them anew.
        backend.update(truncation=None, padding=None)
        names = {name: str(token) for name, token in self._inner.special_tokens_map.items()}
        parts = [backend, self._inner.chat_template, names]
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()

    def decode(self, ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        """The text of token ids; an id without a token is nothing."""
        return str(
            self._inner.decode(
                [int(i) for i in ids],
                skip_special_tokens=skip_special_tokens,
                # It would drop the space before a full stop that the model wrote.
                clean_up_tokenization_spaces=False,
            )
        )

    def save(self, directory: str | os.PathLike[str]) -> None:
        """Writes the files that `load` reads."""
        try:
            self._inner.save_pretrained(str(directory))
        except OSError:
            raise
        except Exception as error:  # the Rust side raises a bare Exception when a write fails
            raise OSError(f"cannot write the tokenizer: {first_line(error)}") from error


def _class_for(directory: Path) -> Any:
    """The class of transformers that reads a directory, as AutoTokenizer chooses it.

    A tokenizer.json says all. Without one the class that a config names must build it: Llama's puts
    a space before the text, say, which the general class does not do for a tokenizer.model. (That
    is what AutoTokenizer takes for a Mistral that names Llama's; here the name counts.)
    """
    import transformers

    general: Any = transformers.PreTrainedTokenizerFast
    if (directory / "tokenizer.json").is_file():
        return general
    said: dict[str, Any] = {}
    for name in ("config.json", "tokenizer_config.json"):
        if (directory / name).is_file():
            said |= json.loads((directory / name).read_bytes())
    wanted = said.get("tokenizer_class") or _CLASSES.get(str(said.get("model_type")))
    if not isinstance(wanted, str) or not wanted.endswith(("Tokenizer", "TokenizerFast")):
        return general
    found = getattr(transformers, wanted.removesuffix("Fast"), None)
    return found if isinstance(found, type) and issubclass(found, general) else general


@contextlib.contextmanager
def _held_log() -> Iterator[None]:
    """Keeps back what transformers logs on the way to an error: that is said in one line."""
    import transformers

    held: list[logging.LogRecord] = []

    def hold(record: logging.LogRecord) -> bool:
        held.append(record)
        return False

    logger = logging.getLogger(transformers.__name__)
    handlers = list(logger.handlers)
    for handler in handlers:
        handler.addFilter(hold)
    try:
        yield
    finally:
        for handler in handlers:
            handler.removeFilter(hold)
    for record in held:
        logger.handle(record)


def has_tokenizer(directory: Path) -> bool:
    """Whether `Tokenizer.load` finds something to load."""
    return any((directory / name).is_file() for name in _VOCABULARIES)


class TextStream:
    """Turns ids that arrive a few at a time into text.

    What all calls of `push` and a last `flush` return is, put together, `decode` of all ids. Text
    is released as soon as later ids cannot change it: half a multi-byte character is held back,
    never shown as a replacement character. Each token costs the same, however long the text is.
    """

    def __init__(self, tokenizer: Tokenizer, *, skip_special_tokens: bool = True) -> None:
        self._tokenizer = tokenizer
        self._skip = skip_special_tokens
        self._pieces = tokenizer.pieces
        # Byte-level tokenizers: each token is some bytes, whatever stands around it.
        self._bytes = codecs.getincrementaldecoder("utf-8")(errors="replace")
        # All others: a window of ids. The first `_shown` of them have been released; they stay,
        # because what a token gives (a leading space, say) depends on whether one precedes it.
        self._window: list[int] = []
        self._shown = 0

    def push(self, ids: Sequence[int]) -> str:
        """The text that these ids complete, possibly none."""
        if self._pieces.is_byte_level:
            data = b"".join(self._pieces.to_bytes(int(i), self._skip) for i in ids)
            return self._bytes.decode(data)
        out = ""
        for i in ids:
            if self._skip and self._pieces.is_special(int(i)):
                continue
            self._window.append(int(i))
            if not self._pieces.is_byte(int(i)):
                out += self._release(final=False)
        return out

    def flush(self) -> str:
        """The rest, when no more ids follow; the stream is then as new."""
        if self._pieces.is_byte_level:
            text = self._bytes.decode(b"", final=True)
            self._bytes.reset()
            return text
        text = self._release(final=True)
        self._window, self._shown = [], 0
        return text

    def _release(self, *, final: bool) -> str:
        # A run of byte tokens is decoded as a whole (one bad byte makes all of them replacement
        # characters), so nothing of it is settled before another token follows.
        before = self._decode(self._window[: self._shown])
        after = self._decode(self._window)
        if not final:
            waiting = len(self._window) - self._shown
            half_character = after.endswith("\ufffd") and waiting < _LONGEST_CHARACTER
            if half_character or len(after) == len(before) or not after.startswith(before):
                return ""
        # The next token's context is what was just released, never less than some text: decoders
        # treat the first token with text differently.
        self._window = self._window[self._shown :]
        self._shown = len(self._window)
        return after[len(before) :]

    def _decode(self, ids: list[int]) -> str:
        return self._tokenizer.decode(ids, skip_special_tokens=self._skip) if ids else ""


class TokenPieces:
    """What single tokens are, for `TextStream`."""

    def __init__(self, backend: Any) -> None:
        from tokenizers import decoders

        self._backend = backend
        self.is_byte_level = isinstance(backend.decoder, decoders.ByteLevel)
        added = backend.get_added_tokens_decoder()
        special = {i: token.content for i, token in added.items() if token.special}
        self._special = frozenset(special)
        self.special_texts = tuple(special.values())
        self._byte_of = _byte_alphabet()

    def is_special(self, token: int) -> bool:
        """Whether `skip_special_tokens` leaves it out."""
        return token in self._special

    def to_bytes(self, token: int, skip_special: bool) -> bytes:
        """What a token of a byte-level vocabulary contributes to the text."""
        if skip_special and token in self._special:
            return b""
        piece = self._backend.id_to_token(token)
        if piece is None:
            return b""
        try:
            return bytes(self._byte_of[c] for c in piece)
        except KeyError:  # an added token, spelled as it is
            return bytes(piece, "utf-8")

    def is_byte(self, token: int) -> bool:
        """Whether it is a single byte of a byte-fallback vocabulary, `<0x0A>`."""
        piece = self._backend.id_to_token(token)
        return piece is not None and re.fullmatch(r"<0x[0-9A-F]{2}>", piece) is not None


def _byte_alphabet() -> dict[str, int]:
    """The characters that byte-level BPE writes for bytes (GPT-2's encoder.py)."""
    visible = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    hidden = [b for b in range(256) if b not in visible]
    return {chr(b): b for b in visible} | {chr(256 + n): b for n, b in enumerate(hidden)}


def check_text(text: str) -> None:
    """Refuses what no tokenizer can encode.

    Raises:
      InputError: half a surrogate pair, which JSON can hold.
    """
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        raise InputError("a prompt holds half a surrogate pair, which is no text") from None
