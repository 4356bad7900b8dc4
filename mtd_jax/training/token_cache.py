"""Tokens of a source on disk, so that a second run does not tokenise again.

An entry is a directory of .npy files, named by a hash of the source's content and of the tokenizer.
It is written beside and renamed: several processes may write the same one, and the first wins.
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from mtd_jax.errors import InputError
from mtd_jax.progress import progress
from mtd_jax.tokenizer import Tokenizer
from mtd_jax.training.documents import tokenize
from mtd_jax.training.sources import content_hash, count_lines, place, read_documents

_FORMAT = "1"
"""Changes when other tokens or other files come of the same source."""
_NAMES = ("ids", "answer", "offsets", "lines")
_TOGETHER = 512
"""Documents tokenised at a time, over the cores."""


class Tokens:
    """The tokens of one source, one document behind another.

    Attributes:
      path: the source.
      key: what its tokens depend on, hashed: its content and the tokenizer.
      ids: [N] uint16 or uint32
      answer: [N] bool: what the model is to write.
      offsets: [documents + 1] int64: where each document begins, and the last one ends.
      lines: [documents] int64: where in the source each stands.
    """

    def __init__(self, path: Path, key: str, arrays: Mapping[str, np.ndarray]) -> None:
        """Takes the arrays as they are; they may be mapped from disk."""
        self.path, self.key = path, key
        self.ids, self.answer, self.offsets, self.lines = (arrays[name] for name in _NAMES)

    def __len__(self) -> int:
        return len(self.lines)

    def place(self, document: int) -> str:
        """How errors name a document."""
        return place(self.path, int(self.lines[document]))


def load_tokens(path: Path, tokenizer: Tokenizer | None, fingerprint: str, cache: Path) -> Tokens:
    """The tokens of a source, from the cache or put there now.

    Args:
      fingerprint: the tokenizer's (`Tokenizer.fingerprint`, which takes a moment).
      cache: the directory of all entries; made if it is not there.

    Raises:
      InputError: the source cannot be read or tokenised, holds nothing, or the cache cannot be
        written.
    """
    key = hashlib.sha256("/".join((_FORMAT, fingerprint, content_hash(path))).encode()).hexdigest()
    entry = cache.expanduser() / key[:32]
    found = _read(entry)
    if found is None:
        found = _tokenize(path, tokenizer)
        try:
            _write(entry, found)
        except OSError as error:
            raise InputError(
                f"cannot write tokens to {cache}: {error.strerror or error}; data.cache names "
                "another directory"
            ) from None
        found = _read(entry) or found  # mapped from disk, the arrays need no memory
    return Tokens(path, key, found)


def _read(entry: Path) -> dict[str, np.ndarray] | None:
    """The arrays of an entry; None where it is not there or was cut short by a crash."""
    try:
        arrays = {name: np.load(entry / f"{name}.npy", mmap_mode="r") for name in _NAMES}
    except (OSError, ValueError, EOFError):
        return None
    length = int(arrays["offsets"][-1])
    whole = len(arrays["ids"]) == len(arrays["answer"]) == length
    return arrays if whole and len(arrays["offsets"]) == len(arrays["lines"]) + 1 else None


def _write(entry: Path, arrays: Mapping[str, np.ndarray]) -> None:
    entry.parent.mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp(prefix=".part-", dir=entry.parent))
    try:
        for name, array in arrays.items():
            np.save(work / f"{name}.npy", array)
        try:
            work.rename(entry)
        except OSError:  # something is there: another process was faster, with the same tokens,
            if _read(entry) is None:  # or a crash left a part
                shutil.rmtree(entry, ignore_errors=True)
                with contextlib.suppress(OSError):
                    work.rename(entry)
    finally:
        shutil.rmtree(work, ignore_errors=True)


def _tokenize(path: Path, tokenizer: Tokenizer | None) -> dict[str, np.ndarray]:
    ids, answers, lengths, lines = [], [], [], []
    with progress(f"tokenising {path.name}", count_lines(path)) as shown:
        documents = read_documents(path)
        while chunk := list(itertools.islice(documents, _TOGETHER)):
            for document, tokens in zip(chunk, tokenize(chunk, tokenizer, path), strict=True):
                if len(tokens.ids):  # an empty text, and a tokenizer without an end token
                    ids.append(_narrow(tokens.ids))
                    answers.append(tokens.answer)
                    lengths.append(len(tokens.ids))
                    lines.append(document.line)
            shown.advance(len(chunk))
    if not ids:
        raise InputError(f"{path} holds no document")
    return {
        "ids": np.concatenate(ids),  # as wide as the widest
        "answer": np.concatenate(answers),
        "offsets": np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)]),
        "lines": np.array(lines, np.int64),
    }


def _narrow(ids: np.ndarray) -> np.ndarray:
    return ids.astype(np.uint16 if ids.max() < 2**16 else np.uint32)
