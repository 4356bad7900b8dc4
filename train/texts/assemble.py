"""From documents to files: each once, in hashed order, split and counted, whole or not at all."""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import json
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

from mtd_jax.convert.atomic import atomic_directory, check_space
from mtd_jax.progress import progress
from mtd_jax.tokenizer import Tokenizer
from train.texts.documents import Document
from train.texts.prompts import prompts_of
from train.texts.sources import Found

SMALL_CHARACTERS = 4_300_000
"""About 1 M tokens, shared equally by the sources that are there."""
_SMALL_PROMPTS = 200
_T = TypeVar("_T")
ASKED = "instructions"
"""The source, in the manifest, of what is asked beside what the sources give."""
_LINE = 60
"""Letters and digits from which on a line of an excluded prompt is known again elsewhere."""


@dataclasses.dataclass(frozen=True)
class Entry:
    """Where a document stands in the file of all documents."""

    order: bytes
    """Hash of seed and content: documents are sorted by it."""
    held_out: bool
    offset: int
    source: str
    characters: int


def normalised(text: str) -> str:
    """The text without what two copies of it may differ in: case, spaces, punctuation."""
    return " ".join("".join(c if c.isalnum() else " " for c in text.casefold()).split())


def traces(text: str) -> set[str]:
    """What a prompt is known again by: itself and each of its long lines."""
    lines = (normalised(line) for line in text.split("\n"))
    return {normalised(text), *(line for line in lines if len(line) >= _LINE)}


def build(
    found: Sequence[Found],
    out: Path,
    *,
    size: str = "full",
    seed: int = 0,
    share: float = 0.01,
    excluded: Iterable[str] = (),
    asked: Iterable[tuple[str, str]] = (),
    tokenizer: Tokenizer | None = None,
    about: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """Writes the corpus of these sources; returns its manifest.

    Args:
      share: of the documents that is held out.
      excluded: prompts that must not be in it.
      asked: ids and texts of prompts that no source gives.
      about: goes into the manifest as it is.
    """
    banned = {trace for text in excluded for trace in traces(text)} - {""}
    counts: Counter[str] = Counter()
    with atomic_directory(out) as work:
        check_space(work, 3_000_000 if size == "small" else 1_200_000_000)
        room = Counter({f.source.name: f.source.prompts for f in found} | {ASKED: 10_000})
        if size == "small":
            room = Counter(dict.fromkeys(room, _SMALL_PROMPTS))
        offered = room.copy()
        spool = work / "spool"
        with spool.open("wb") as file:
            entries = list(_collected(_shown(found, "sources"), file, seed, share, banned, counts))
        chosen = _within_budget(entries, found, size)
        statistics: dict[str, Counter[str]] = {name: Counter() for name in room}
        with spool.open("rb") as file:
            for name, is_held_out in (("held_out", True), ("train", False)):
                part = [entry for entry in chosen if entry.held_out == is_held_out]
                documents = _written(work / f"{name}.jsonl", _read(file, _shown(part, name)))
                for document in documents:
                    counter = statistics[document.source]
                    counter[f"{name}_documents"] += 1
                    counter["characters"] += len(document.content)
                    if tokenizer is not None:
                        counter["tokens"] += len(tokenizer.encode(document.content))
            turns = itertools.chain(
                _turns(_read(file, _shown([e for e in chosen if not e.held_out], "prompts")), room),
                ((ASKED, *pair) for pair in asked),
            )
            held_out = _read(file, (entry for entry in chosen if entry.held_out))
            known = {normalised(turn) for item in held_out for turn in item.user_turns[:1]}
            _write_prompts(work / "prompts.jsonl", turns, room, seed, known, banned)
            for name, count in (offered - room).items():
                statistics[name]["prompts"] = count
        spool.unlink()
        manifest: dict[str, Any] = {
            "format": 1,
            "size": size,
            "seed": seed,
            "held_out_share": share,
            **(about or {}),
            "left_out": dict(sorted(counts.items())),
            "sources": {
                **{f.source.name: {**f.described(), **statistics[f.source.name]} for f in found},
                ASKED: {"kind": "instructions", "licence": "Apache-2.0", **statistics[ASKED]},
            },
            "total": dict(sum(statistics.values(), Counter())),
            "files": {
                f"{name}.jsonl": _sha256(work / f"{name}.jsonl")
                for name in ("train", "held_out", "prompts")
            },
        }
        text = json.dumps(manifest, indent=1, ensure_ascii=False) + "\n"
        (work / "manifest.json").write_text(text, encoding="utf-8")
    return manifest


def _collected(
    found: Iterable[Found],
    spool: BinaryIO,
    seed: int,
    share: float,
    banned: set[str],
    counts: Counter[str],
) -> Iterator[Entry]:
    """Puts every document that is to be had into the spool, each once."""
    seen: set[bytes] = set()
    for item in found:
        for document in item.documents():
            key = hashlib.sha256(normalised(document.content).encode()).digest()
            if key in seen:
                counts["duplicates"] += 1
                continue
            seen.add(key)
            if not banned.isdisjoint(set().union(*map(traces, document.user_turns))):
                counts["excluded"] += 1
                continue
            yield Entry(
                order=hashlib.sha256(f"{seed}".encode() + key).digest()[:12],
                held_out=int.from_bytes(key[:4], "big") < share * 2**32,
                offset=spool.tell(),
                source=document.source,
                characters=len(document.content),
            )
            spool.write(document.line())


def _within_budget(entries: list[Entry], found: Sequence[Found], size: str) -> list[Entry]:
    """In their final order, those that each source may give."""
    entries.sort(key=lambda entry: entry.order)
    equal = SMALL_CHARACTERS // max(len(found), 1)
    room = {f.source.name: equal if size == "small" else f.source.characters for f in found}
    chosen = []
    for entry in entries:
        if room[entry.source] > 0:
            room[entry.source] -= entry.characters
            chosen.append(entry)
    return chosen


def _turns(documents: Iterable[Document], room: Counter[str]) -> Iterator[tuple[str, str, str]]:
    """Source, id and text of user turns, of sources that have room for more."""
    for document in documents:
        for pair in prompts_of(document) if room[document.source] > 0 else ():
            yield document.source, *pair


def _write_prompts(
    path: Path,
    turns: Iterable[tuple[str, str, str]],
    room: Counter[str],
    seed: int,
    known: set[str],
    banned: set[str],
) -> None:
    """Each once, in hashed order, none that is known or banned; takes from `room` what is written.

    Args:
      turns: source, id, text.
    """
    lines: list[tuple[bytes, bytes]] = []
    taken = set(known)
    for source, name, turn in turns:
        key = normalised(turn)
        if room[source] <= 0 or key in taken or not banned.isdisjoint(traces(turn)):
            continue
        taken.add(key)
        room[source] -= 1
        order = hashlib.sha256(f"{seed} {name}".encode()).digest()
        lines.append((order, Document(name, source, ({"role": "user", "content": turn},)).line()))
    path.write_bytes(b"".join(line for _, line in sorted(lines)))


def _read(spool: BinaryIO, entries: Iterable[Entry]) -> Iterator[Document]:
    for entry in entries:
        spool.seek(entry.offset)
        yield Document.parse(spool.readline())


def _written(path: Path, documents: Iterable[Document]) -> Iterator[Document]:
    with path.open("wb") as file:
        for document in documents:
            file.write(document.line())
            yield document


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _shown(values: Sequence[_T], name: str) -> Iterator[_T]:
    """The values, while it is shown how far they are."""
    with progress(name, len(values)) as bar:
        for value in values:
            yield value
            bar.advance()
