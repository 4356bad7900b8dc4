"""From the [data] table of a config to rows: read, tokenise, check, put some aside, pack."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from mtd_jax.config import ModelConfig
from mtd_jax.errors import InputError
from mtd_jax.tokenizer import Tokenizer
from mtd_jax.training.config import DataConfig
from mtd_jax.training.rows import Corpus, Rows
from mtd_jax.training.sources import find_sources
from mtd_jax.training.token_cache import load_tokens


@dataclasses.dataclass(frozen=True)
class Datasets:
    """What a run learns from and is measured on."""

    train: Rows
    held_out: Rows | None
    """None where the config puts nothing aside."""


def prepare(
    data: DataConfig, tokenizer: Tokenizer | None, model: ModelConfig, *, seed: int, cache: Path
) -> Datasets:
    """The rows of a run: the same on every host, for the same files, config and seed.

    Args:
      tokenizer: the model's; None does for data that are token ids.
      model: bounds the length of rows and the ids.
      cache: directory of tokenised texts where the config names none.

    Raises:
      InputError: rows longer than the context; another model's tokenizer; whatever is wrong with a
        source (see `sources` and `documents`); an id outside the vocabulary; nothing to learn; a
        side of the split is empty.
    """
    if data.length > model.context_length:
        raise InputError(
            f"data.length = {data.length} is more than the model's context of "
            f"{model.context_length}"
        )
    if tokenizer is not None:
        _check_tokenizer(tokenizer, model)
    cache = Path(data.cache) if data.cache else cache
    fingerprint = "" if tokenizer is None else tokenizer.fingerprint()

    def corpus(paths: Sequence[str]) -> Corpus:
        sources = [load_tokens(p, tokenizer, fingerprint, cache) for p in find_sources(paths)]
        return _checked(Corpus(sources), data, model)

    train = corpus(data.train)
    everything = np.arange(len(train))
    if data.held_out:
        held_out = corpus(data.held_out)
        return Datasets(
            _rows(train, everything, data, seed, "data.train"),
            _rows(held_out, np.arange(len(held_out)), data, seed, "data.held_out"),
        )
    if not data.held_out_fraction:
        return Datasets(_rows(train, everything, data, seed, "data.train"), None)
    aside = _aside(train, data.held_out_fraction)
    if aside.all() or not aside.any():
        raise InputError(
            f"data.held_out_fraction = {data.held_out_fraction} puts {int(aside.sum())} of "
            f"{len(train)} documents aside: name files in data.held_out"
        )
    return Datasets(
        _rows(train, everything[~aside], data, seed, "data.train"),
        _rows(train, everything[aside], data, seed, "what data.held_out_fraction puts aside"),
    )


def _check_tokenizer(tokenizer: Tokenizer, model: ModelConfig) -> None:
    """Refuses a tokenizer that cannot be the model's, whatever ids the texts happen to have."""
    known = tokenizer.vocab_size
    if known > model.vocab_size:
        raise InputError(
            f"the tokenizer has {known} tokens, more than the model's vocabulary of "
            f"{model.vocab_size}: it is another model's"
        )
    # Less is no mismatch: vocabularies are padded (Qwen3: 151,669 tokens of 151,936).
    if 2 * known < model.vocab_size:
        raise InputError(
            f"the tokenizer has {known} tokens, less than half of the model's vocabulary of "
            f"{model.vocab_size}: it is another model's"
        )
    ends = model.eos_token_ids
    for end in tokenizer.eos_token_ids:
        if ends and end not in ends:
            raise InputError(
                f"the tokenizer ends a text with token {end}, the model with "
                f"{' or '.join(map(str, ends))} (eos_token_ids): it is another model's"
            )


def _checked(corpus: Corpus, data: DataConfig, model: ModelConfig) -> Corpus:
    """Refuses ids that the model does not have, and documents without an answer to learn."""
    for source in corpus.sources:
        if source.ids.max() >= model.vocab_size:
            token = int(np.argmax(source.ids >= model.vocab_size))
            document = int(np.searchsorted(source.offsets, token, side="right")) - 1
            raise InputError(
                f"{source.place(document)}: token {source.ids[token]} is outside the model's "
                f"vocabulary of {model.vocab_size}: it is another model's tokenizer or data"
            )
        if data.loss == "assistant":
            found = np.logical_or.reduceat(source.answer, source.offsets[:-1])
            if not found.all():
                raise InputError(
                    f"{source.place(int(np.argmin(found)))}: the assistant says nothing that could "
                    'be learned (data.loss = "all" learns everything)'
                )
    return corpus


def _aside(corpus: Corpus, fraction: float) -> np.ndarray:
    """Which documents are held out: [documents] bool.

    By a hash of the tokens, so that copies of a document are on one side, and a document stays on
    its side when others come or go.
    """
    aside = np.empty(len(corpus), bool)
    for document, length in enumerate(corpus.lengths.tolist()):
        ids, _ = corpus.tokens(document, 0, length)
        digest = hashlib.blake2b(ids.astype("<u4").tobytes(), digest_size=8).digest()
        aside[document] = int.from_bytes(digest, "big") < fraction * 2**64
    return aside


def _rows(corpus: Corpus, documents: np.ndarray, data: DataConfig, seed: int, what: str) -> Rows:
    rows = Rows(corpus, documents, data, seed)
    if len(rows) == 0:
        shortest = int(corpus.lengths[documents].min())
        if data.overlong == "drop" and shortest > data.length:
            raise InputError(
                f"{what}: every document is longer than data.length = {data.length} (the shortest "
                f"has {shortest} tokens), and data.overlong = 'drop' leaves them out"
            )
        raise InputError(f"{what} holds no token to learn")
    return rows
