"""Instructions made of patterns, asked beside what the sources of the corpus give."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

from train.texts.assemble import ASKED, build
from train.texts.documents import Document, dialogue
from train.texts.instructions import instructions
from train.texts.sources import Found, Source


def _talks(path: Path) -> Iterator[Document]:
    for i in range(300):
        document = dialogue(str(i), [f"Why is number {i} not prime, in short?", "It is so."])
        assert document is not None
        yield document


def test_they_are_asked_once_mixed_and_none_that_is_excluded(tmp_path: Path) -> None:
    source = Source("talks", "conversations", "MIT", "https://example.org", _talks)
    asked = list(instructions())
    assert len({name for name, _ in asked}) == len({turn for _, turn in asked}) == len(asked) > 1000
    found = [Found(source, tmp_path / "talks.whl", "1.0")]
    manifest = build(found, tmp_path / "out", asked=asked, excluded=[asked[5][1]])
    lines = (tmp_path / "out" / "prompts.jsonl").read_text(encoding="utf-8").splitlines()
    prompts = [json.loads(line) for line in lines]
    assert manifest["sources"][ASKED]["prompts"] == len(asked) - 1
    assert sum(prompt["source"] == ASKED for prompt in prompts) == len(asked) - 1
    assert {prompt["source"] for prompt in prompts[:50]} == {ASKED, "talks"}
    small = build(found, tmp_path / "small", asked=asked, size="small")
    assert small["sources"][ASKED]["prompts"] == 200
