"""Rows and batches: exact, the same on every machine, whatever the hosts and wherever resumed."""

import dataclasses
import hashlib
import itertools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mtd_jax.errors import InputError
from mtd_jax.tokenizer import Tokenizer
from mtd_jax.training.batches import batches, held_out_batches
from mtd_jax.training.config import DataConfig
from mtd_jax.training.data import Datasets, prepare
from mtd_jax.training.rows import Corpus, Rows, describe_row
from mtd_jax.training.token_cache import Tokens
from mtd_jax.transformer.packed import Packed
from tests.support import tiny, tokenizers
from tests.support.real import model_directory

FIELDS = [field.name for field in dataclasses.fields(Packed)]
Document = tuple[list[int], list[bool]]


def corpus_of(documents: Sequence[Document], path: str = "memory.jsonl") -> Corpus:
    """As two sources, so that the seam between them is met."""
    cut = len(documents) // 2
    return Corpus([source_of(half, path) for half in (documents[:cut], documents[cut:]) if half])


def source_of(documents: Sequence[Document], path: str) -> Tokens:
    arrays = {
        "ids": np.array([i for ids, _ in documents for i in ids], np.uint16),
        "answer": np.array([a for _, answer in documents for a in answer], bool),
        "offsets": np.cumsum([0, *(len(ids) for ids, _ in documents)]),
        "lines": np.arange(1, len(documents) + 1),
    }
    return Tokens(Path(path), str(documents), arrays)


def numbered(count: int, length: int = 5) -> list[Document]:
    """Documents that can be told apart by any of their tokens."""
    return [([100 + d] * length, [False] * 2 + [True] * (length - 2)) for d in range(count)]


def rows_of(documents: Sequence[Document], seed: int = 0, **changes: Any) -> Rows:
    data = dataclasses.replace(DataConfig(train=("x",), length=8), **changes)
    return Rows(corpus_of(documents), np.arange(len(documents)), data, seed)


def same(a: Packed, b: Packed) -> bool:
    return all(np.array_equal(getattr(a, name), getattr(b, name)) for name in FIELDS)


# --- rows -----------------------------------------------------------------------------------------


def test_the_row_of_the_docstring() -> None:
    documents = [([11, 12, 13], [False, True, True]), ([21, 22], [False, True])]
    rows = rows_of(documents, length=6)
    (row,) = rows
    order = [0, 1] if row.tokens[0] == 11 else [1, 0]
    expected = [i for d in order for i in documents[d][0]]
    assert row.tokens.tolist() == [*expected, 0]
    assert row.positions.tolist() == [*(i for d in order for i in range(3 - d)), 0]
    assert row.segments.tolist() == [*(s for s, d in enumerate(order, 1) for _ in range(3 - d)), 0]
    assert row.learn.tolist() == row.answer.tolist()
    assert row.answer.tolist() == [*(a for d in order for a in documents[d][1]), False]
    assert {getattr(row, name).dtype.name for name in FIELDS} == {"int32", "bool"}


DOCUMENTS = st.lists(st.lists(st.booleans(), min_size=1, max_size=25), min_size=1, max_size=30)


@settings(max_examples=200)
@given(
    masks=DOCUMENTS,
    packing=st.booleans(),
    overlong=st.sampled_from(["split", "drop"]),
    loss=st.sampled_from(["assistant", "all"]),
)
def test_every_token_that_can_be_learned_is_there_once(
    masks: list[list[bool]], packing: bool, overlong: str, loss: str
) -> None:
    # Token ids count through, so that each tells its document and place.
    ids = itertools.count(1)
    documents = [([next(ids) for _ in mask], mask) for mask in masks]
    rows = rows_of(documents, packing=packing, overlong=overlong, loss=loss)
    expected: dict[int, tuple[int, bool]] = {}
    for tokens, mask in documents:
        if overlong == "drop" and len(tokens) > 8:
            continue
        for start in range(0, len(tokens), 8):
            piece, wanted = tokens[start : start + 8], [True] * 8
            wanted = (mask[start : start + 8] if loss == "assistant" else wanted)[: len(piece)]
            if any(wanted[1:]):
                expected |= {t: (i, i > 0 and wanted[i]) for i, t in enumerate(piece)}
    found: dict[int, tuple[int, bool]] = {}
    for row in rows:
        real = row.segments > 0
        assert row.learn.any()
        assert not row.tokens[~real].any()
        assert not row.answer[~real].any()
        for token, place, learn in zip(
            row.tokens[real], row.positions[real], row.learn[real], strict=True
        ):
            assert int(token) not in found
            found[int(token)] = (int(place), bool(learn))
        segments = row.segments[real].tolist()
        assert segments == sorted(segments)
        assert set(segments) == set(range(1, max(segments) + 1))
        assert packing or set(segments) == {1}
        # Neighbours in a segment are neighbours in a document.
        joined = (np.diff(row.segments) == 0) & real[1:]
        assert (np.diff(row.tokens)[joined] == 1).all()
    assert found == expected
    numbers = rows.statistics
    assert numbers.tokens == len(expected)
    assert numbers.learned == sum(learn for _, learn in expected.values())
    assert numbers.fill == pytest.approx(len(expected) / max(8 * len(rows), 1))
    kept = sum(any(t in expected for t in tokens) for tokens, _ in documents)
    assert (numbers.documents, numbers.left_out) == (len(documents), len(documents) - kept)


def test_the_seed_alone_sets_the_rows() -> None:
    documents = numbered(50, 3)
    first, again, other = (rows_of(documents, seed) for seed in (3, 3, 4))
    assert all(same(a, b) for a, b in zip(first, again, strict=True))
    assert not all(same(a, b) for a, b in zip(first, other, strict=True))


def test_rows_are_those_of_every_machine() -> None:
    """A change here means that runs can no longer be repeated."""
    rows = rows_of(numbered(50, 3), 3)
    tokens = np.stack([row.tokens for row in rows]).astype("<i4")
    assert hashlib.sha256(tokens.tobytes()).hexdigest()[:16] == "74c3938c67b1e485"
    ten = rows_of(numbered(10), packing=False)
    order = np.concatenate([batch.tokens[:, 0] - 100 for batch in take(3, ten)])
    assert order.tolist() == [1, 5, 2, 3, 6, 7, 4, 9, 0, 8, 9, 6]


def test_rows_that_differ_are_told_apart() -> None:
    documents = numbered(20, 3)
    found = [rows_of(documents, 3).fingerprint for _ in range(2)]
    found += [
        rows_of(documents, 4).fingerprint,
        rows_of(documents, 3, length=9).fingerprint,
        rows_of(documents, 3, loss="all").fingerprint,
        rows_of(documents, 3, packing=False).fingerprint,
        rows_of(numbered(21, 3), 3).fingerprint,
        rows_of([*documents[:-1], ([1] * 3, documents[0][1])], 3).fingerprint,
    ]
    assert found[0] == found[1]
    assert len(set(found)) == len(found) - 1


# --- batches --------------------------------------------------------------------------------------


def take(count: int, rows: Rows, **options: Any) -> list[Packed]:
    return list(itertools.islice(batches(rows, **{"batch_size": 4, "seed": 1, **options}), count))


def global_batches(count: int, rows: Rows, hosts: int, **options: Any) -> list[np.ndarray]:
    parts = [
        take(count, rows, process_index=host, process_count=hosts, **options)
        for host in range(hosts)
    ]
    return [np.concatenate([part.tokens for part in batch]) for batch in zip(*parts, strict=True)]


def test_a_batch_is_rows_stacked() -> None:
    rows = rows_of(numbered(10))
    (batch,) = take(1, rows)
    for row in range(4):
        one = Packed(**{name: getattr(batch, name)[row] for name in FIELDS})
        assert any(same(one, other) for other in rows)
    leaves = jax.tree.leaves(batch)
    assert {(type(leaf), leaf.shape) for leaf in leaves} == {(np.ndarray, (4, 8))}
    assert [leaf.dtype.name for leaf in leaves] == ["int32"] * 3 + ["bool"] * 2


@pytest.mark.parametrize("count", [1, 3, 4, 10])
def test_each_epoch_has_every_row_in_an_order_of_its_own(count: int) -> None:
    rows = rows_of(numbered(count), packing=False)
    batch_size = 4
    seen = np.concatenate([b.tokens[:, 0] for b in take(3 * count, rows, batch_size=batch_size)])
    epochs = seen[: len(seen) // count * count].reshape(-1, count)
    assert (np.sort(epochs, axis=1) == 100 + np.arange(count)[None, :]).all()
    if count == 10:
        assert len({tuple(epoch) for epoch in epochs.tolist()}) == len(epochs)


def test_epochs_may_be_counted() -> None:
    rows = rows_of(numbered(10), packing=False)
    assert len(take(100, rows, epochs=1)) == 2
    assert len(take(100, rows, epochs=2)) == 5


@pytest.mark.parametrize("hosts", [2, 4])
def test_hosts_share_the_same_batches(hosts: int) -> None:
    rows = rows_of(numbered(11), packing=False)
    alone, shared = global_batches(9, rows, 1), global_batches(9, rows, hosts)
    assert all(np.array_equal(a, b) for a, b in zip(alone, shared, strict=True))


@pytest.mark.parametrize("hosts", [1, 2, 4])
@pytest.mark.parametrize("stop", [0, 1, 4, 7])
def test_a_run_resumes_on_any_number_of_hosts(hosts: int, stop: int) -> None:
    """In the midst of an epoch, from the state of one host."""
    rows = rows_of(numbered(11), packing=False)
    whole = global_batches(10, rows, 1)
    before = batches(rows, batch_size=4, seed=1, process_index=1, process_count=2)
    for _ in range(stop):
        next(before)
    state = json.loads(json.dumps(before.get_state()))
    parts = []
    for host in range(hosts):
        after = batches(rows, batch_size=4, seed=1, process_index=host, process_count=hosts)
        next(after)  # what was read ahead must not count
        after.set_state(state)
        parts.append([next(after).tokens for _ in range(10 - stop)])
    resumed = [np.concatenate(batch) for batch in zip(*parts, strict=True)]
    assert all(np.array_equal(a, b) for a, b in zip(whole[stop:], resumed, strict=True))


def test_hosts_that_do_not_divide_a_batch() -> None:
    rows = rows_of(numbered(4))
    with pytest.raises(InputError, match="batch_size = 4 rows cannot be shared by 3 hosts"):
        batches(rows, batch_size=4, seed=0, process_count=3)
    with pytest.raises(InputError, match="cannot be shared by 3 hosts"):
        next(held_out_batches(rows, batch_size=4, most=1, process_count=3))


@pytest.mark.parametrize("hosts", [1, 2, 4])
def test_held_out_batches_are_filled_up(hosts: int) -> None:
    rows = rows_of(numbered(5), packing=False)
    parts = [
        list(held_out_batches(rows, batch_size=4, most=9, process_index=h, process_count=hosts))
        for h in range(hosts)
    ]
    assert [len(part) for part in parts] == [2] * hosts
    whole = np.concatenate(
        [np.concatenate([p.tokens for p in batch]) for batch in zip(*parts, strict=True)]
    )
    expected = np.stack([row.tokens for row in rows])
    assert np.array_equal(whole[:5], expected)
    assert not whole[5:].any()
    assert not parts[-1][1].segments.any() or hosts == 1
    assert not any(p[1].learn[-1].any() for p in parts[1:])
    assert len(list(held_out_batches(rows, batch_size=4, most=1))) == 1


# --- from files -----------------------------------------------------------------------------------

USER, BOT = {"role": "user", "content": "Hi."}, {"role": "assistant", "content": "Hello!"}
MODEL = tiny.config(vocab_size=400, eos_token_ids=(1,))


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return tokenizers.byte_level(template=tokenizers.TURNS)


def write(path: Path, *lines: Any) -> str:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return str(path)


def made(path: Path, tokenizer: Tokenizer | None, *lines: Any, **changes: Any) -> Datasets:
    data = DataConfig(train=(write(path / "train.jsonl", *lines),), length=64)
    data = dataclasses.replace(data, **changes)
    return prepare(data, tokenizer, MODEL, seed=0, cache=path / "cache")


def test_a_conversation_to_look_at(tmp_path: Path, tokenizer: Tokenizer) -> None:
    rows = made(tmp_path, tokenizer, {"messages": [USER, BOT, USER]}).train
    assert describe_row(rows[0], tokenizer) == [
        ("<|user|>Hi.</s>\n<|bot|>", False, 1),
        ("Hello!</s>", True, 1),
        ("\n<|user|>Hi.</s>\n", False, 1),
        ("", False, 0),
    ]
    everything = made(tmp_path, tokenizer, {"messages": [USER, BOT]}, loss="all").train
    assert [stretch.learned for stretch in describe_row(everything[0], tokenizer)] == [0, 1, 0]
    ids = describe_row(rows[0], None)[1].text
    assert ids == " ".join(map(str, tokenizer.encode("Hello!</s>")))


def test_a_split_keeps_copies_together(tmp_path: Path, tokenizer: Tokenizer) -> None:
    lines = [{"text": f"text number {i % 40}"} for i in range(120)]
    whole = made(tmp_path, tokenizer, *lines, held_out_fraction=0.3)
    assert whole.held_out is not None

    def texts(rows: Rows) -> list[str]:
        found = (describe_row(row, tokenizer) for row in rows)
        return "".join(s.text for row in found for s in row).split("</s>")[:-1]

    train, held_out = texts(whole.train), texts(whole.held_out)
    assert len(train) + len(held_out) == 120
    assert not set(train) & set(held_out)
    assert 0.1 < len(held_out) / 120 < 0.5
    fewer = made(tmp_path, tokenizer, *lines[20:40], held_out_fraction=0.3)
    assert fewer.held_out is not None
    assert set(texts(fewer.held_out)) <= set(held_out)


def test_held_out_files(tmp_path: Path, tokenizer: Tokenizer) -> None:
    other = write(tmp_path / "other.jsonl", {"text": "two"}, {"text": "three"})
    found = made(tmp_path, tokenizer, {"text": "one"}, held_out=(other,), held_out_fraction=0.5)
    assert found.held_out is not None
    assert (found.train.statistics.documents, found.held_out.statistics.documents) == (1, 2)


def test_the_cache_of_the_config_counts(tmp_path: Path, tokenizer: Tokenizer) -> None:
    made(tmp_path, tokenizer, {"text": "one"}, cache=str(tmp_path / "mine"))
    assert (tmp_path / "mine").is_dir()
    assert not (tmp_path / "cache").exists()


def test_token_ids_take_no_tokenizer(tmp_path: Path) -> None:
    rows = made(tmp_path, None, {"token_ids": [1, 2, 3, 4], "prompt_tokens": 2}).train
    assert rows[0].tokens[:5].tolist() == [1, 2, 3, 4, 0]
    assert rows[0].learn[:5].tolist() == [False, False, True, True, False]


@pytest.mark.parametrize(
    ("lines", "changes", "message"),
    [
        ([], {}, "train.jsonl holds no document"),
        ([{"text": "a"}], {"length": 513}, "length = 513 is more than the model's context of 512"),
        ([{"text": "a"}, {"messages": [USER]}], {}, "line 2: the assistant says nothing"),
        ([{"token_ids": [1, 2], "prompt_tokens": 2}], {}, "line 1: the assistant says nothing"),
        (
            [{"text": "a"}, {"token_ids": [1, 399, 400]}],
            {},
            "line 2: token 400 is outside the model's vocabulary of 400",
        ),
        ([{"token_ids": [1]}], {}, "data.train holds no token to learn"),
        (
            [{"token_ids": [1] * 9}],
            {"length": 8, "overlong": "drop"},
            r"longer than data.length = 8 \(the shortest has 9",
        ),
        ([{"text": "a"}] * 5, {"held_out_fraction": 0.5}, r"puts [05] of 5 documents aside"),
        ([{"messages": [BOT]}], {}, "line 1: message 0: which text is the assistant's"),
    ],
)
def test_bad_input(
    tmp_path: Path, tokenizer: Tokenizer, lines: list[Any], changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(InputError, match=message) as caught:
        made(tmp_path, tokenizer, *lines, **changes)
    assert "\n" not in str(caught.value)


def test_questions_alone_can_be_learned_when_asked_for(
    tmp_path: Path, tokenizer: Tokenizer
) -> None:
    made(tmp_path, tokenizer, {"messages": [USER]}, loss="all")
    # The same cached tokens are still refused where answers are to be learned.
    with pytest.raises(InputError, match="line 1: the assistant says nothing"):
        made(tmp_path, tokenizer, {"messages": [USER]})


def test_the_real_model(tmp_path: Path) -> None:
    real = Tokenizer.load(model_directory())
    data = DataConfig(
        train=(write(tmp_path / "a.jsonl", *[{"messages": [USER, BOT]}] * 40),), length=256
    )
    model = tiny.config(vocab_size=49152)
    rows = prepare(data, real, model, seed=0, cache=tmp_path / "cache").train
    assert rows.statistics.fill > 0.7
    learned = [s.text for s in describe_row(rows[0], real) if s.learned]
    assert set(learned) == {"Hello!<|im_end|>"}
