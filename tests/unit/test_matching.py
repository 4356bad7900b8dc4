from __future__ import annotations

from collections import Counter
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks.replay import state_of
from mtd_jax import methods
from mtd_jax.decoding.matching import KINDS, extended_matches, suffix_matches
from mtd_jax.decoding.method import DecodeState

CAPACITY, BATCH = 24, 4

Text = list[int]
# A few tokens, so that much occurs again.
texts = st.lists(
    st.lists(st.integers(0, 2), min_size=1, max_size=CAPACITY), min_size=BATCH, max_size=BATCH
)


def _filled(rows: list[Text]) -> tuple[jax.Array, jax.Array]:
    """Texts in one buffer; behind each lies what looks like more of it, and is not."""
    text = [(row + row[:1] * CAPACITY)[: max(CAPACITY, *map(len, rows))] for row in rows]
    return jnp.asarray(text, jnp.int32), jnp.asarray([len(row) for row in rows], jnp.int32)


def _state(rows: list[Text]) -> DecodeState:
    """A state whose `history` is the rows; nothing else of it is looked at."""
    return state_of(*_filled(rows), np.zeros(len(rows)))


@jax.jit
def _propose(method: Any, state: DecodeState) -> tuple[jax.Array, jax.Array]:
    return method.propose(state)


def _common(ended: Text, text: Text, longest: int) -> int:
    """Tokens at the end of both, `longest` at most."""
    count = 0
    while count < min(len(ended), len(text), longest) and ended[-1 - count] == text[-1 - count]:
        count += 1
    return count


def _matches(text: Text, drafts: Text, longest: int) -> Text:
    """At every place of the text with a follower: how far it ends as text and drafts do."""
    return [_common(text[: i + 1], text + drafts, longest) for i in range(len(text) - 1)]


@given(texts, st.sampled_from([1, 2, 5]), st.lists(st.integers(0, 3), min_size=3, max_size=3))
def test_matches_equal_their_definition(rows: list[Text], longest: int, more: Text) -> None:
    text, length = _filled(rows)
    matched = suffix_matches(text, length, longest)
    for drafts in ([], more[:1], more[:2], more):
        if drafts:
            token = jnp.full(BATCH, drafts[-1], jnp.int32)
            matched = extended_matches(matched, text, length, token, longest)
        for row, got in zip(rows, np.asarray(matched), strict=True):
            expected = _matches(row, drafts, longest)
            assert got.tolist() == expected + [0] * (CAPACITY - len(expected))


def _seen(text: Text, drafts: Text, longest: int) -> tuple[int, Text]:
    """The highest order that knows what text and drafts end in, and where it was followed."""
    for order in range(min(longest, len(text) + len(drafts)), 0, -1):
        context = (text + drafts)[-order:]
        known = [i for i in range(order, len(text)) if text[i - order : i] == context]
        if known:
            return order, known
    return 0, []


def _followers(text: Text, drafts: Text, longest: int) -> Text:
    """An n-gram table of every order: the most frequent followers first, of equals the latest."""
    _, known = _seen(text, drafts, longest)
    counts = Counter(text[i] for i in known)
    latest = {text[i]: i for i in known}
    return sorted(counts, key=lambda token: (-counts[token], -latest[token]))


def _kind(text: Text, drafts: Text, longest: int, token: int) -> int:
    """The order, and whether it says so once (1), mostly (2), always (3) or not even that (0)."""
    order, known = _seen(text, drafts, longest)
    share = [text[i] for i in known].count(token) / max(len(known), 1)
    if share == 0:
        return 0
    if len(known) == 1:
        return order * KINDS + 1
    return order * KINDS + (3 if share == 1 else 2 if share > 0.5 else 0)


def _table_drafts(method: Any, text: Text) -> Text:
    """For every node of the method's tree in turn."""
    drafts: dict[int, int] = {}
    for node in range(1, method.tree.size):
        parent = method.tree.parents[node - 1]
        way = [n for n in method.tree.paths[parent] if n > 0]
        behind = [drafts[int(n)] for n in dict.fromkeys(way)]
        known = [] if -1 in behind else _followers(text, behind, method.longest)
        rank = int(method.tree.rank[node])
        drafts[node] = known[rank] if rank < len(known) else -1
    return list(drafts.values())


NGRAMS = [
    methods.ngram(drafts=5, longest=3),
    methods.ngram(drafts=3, longest=1),
    methods.ngram(branches="2x2", longest=2),
    methods.ngram(branches="3x1x2", longest=6),
]


@pytest.mark.parametrize("method", NGRAMS, ids=lambda m: f"{m.tree.parents}-{m.longest}")
@settings(max_examples=60)
@given(rows=texts)
def test_ngrams_are_read_from_a_table_of_all_orders(method: Any, rows: list[Text]) -> None:
    drafts, kinds = _propose(method, _state(rows))
    for row, got, kind in zip(rows, np.asarray(drafts), np.asarray(kinds), strict=True):
        assert got.tolist() == _table_drafts(method, row)
        best = [int(got[node - 1]) for node in _first_path(method.tree)]
        ahead = [best[:i] for i in range(len(best))]
        expected = [
            0 if -1 in [*before, token] else _kind(row, before, method.longest, token)
            for before, token in zip(ahead, best, strict=True)
        ]
        assert kind.tolist() == expected


def _first_path(tree: Any) -> list[int]:
    nodes, path = tree.children(0), []
    while nodes:
        path.append(nodes[0])
        nodes = tree.children(nodes[0])
    return path


LOOKUPS = [methods.prompt_lookup(drafts=4, longest=3), methods.prompt_lookup(drafts=9, longest=1)]


def _first_continuation(text: Text, drafts: int, longest: int) -> Text:
    """The search as Saxena's page has it: the longest n-gram first, from left to right."""
    for order in range(min(longest, len(text) - 1), 0, -1):
        for start in range(len(text) - order):
            if text[start : start + order] == text[-order:]:
                found = text[start + order : start + order + drafts]
                return found + [-1] * (drafts - len(found))
    return [-1] * drafts


@pytest.mark.parametrize("method", LOOKUPS, ids=lambda m: f"{m.tree.size - 1}-{m.longest}")
@settings(max_examples=100)
@given(rows=texts)
def test_lookup_copies_what_followed_first(method: Any, rows: list[Text]) -> None:
    drafts, kinds = _propose(method, _state(rows))
    for row, got, kind in zip(rows, np.asarray(drafts), np.asarray(kinds), strict=True):
        assert got.tolist() == _first_continuation(row, method.tree.size - 1, method.longest)
        assert kind[0] == _kind(row, [], method.longest, int(got[0]))
        order = int(kind[0]) // KINDS
        copied = [min(order + i, method.longest) * KINDS + 1 for i in range(1, len(got))]
        assert kind[1:].tolist() == [
            0 if token < 0 else k for token, k in zip(got[1:], copied, strict=True)
        ]


@pytest.mark.parametrize("make", [methods.ngram, methods.prompt_lookup])
def test_no_drafts_are_wanted(make: Any) -> None:
    """`drafts=0` is allowed: plain decoding."""
    method = make(drafts=0)
    drafts, kinds = _propose(method, _state([[1, 2, 1], [1, 2, 3]]))
    assert drafts.shape == kinds.shape == (2, 0)


def test_nothing_is_known_of_a_first_token() -> None:
    for method in (*NGRAMS, *LOOKUPS):
        drafts, kinds = _propose(method, _state([[7], [7, 8]]))
        assert set(np.asarray(drafts).ravel().tolist()) == {-1}
        assert not np.any(kinds)


def test_a_text_of_thousands_of_tokens_is_searched_to_its_end() -> None:
    """The newest match is the one that counts, as is the last token of a full buffer."""
    rng = np.random.default_rng(0)
    text = [*rng.permutation(3000).tolist(), 4001, 4002, 4003, 4004, 5, 5, 4001, 4002]
    for method in (methods.ngram(drafts=3, longest=4), methods.prompt_lookup(3, 4)):
        drafts, kinds = _propose(method, _state([text]))
        assert drafts[0].tolist() == [4003, 4004, 5]
        assert kinds[0, 0] == 2 * KINDS + 1


@pytest.mark.parametrize("times", [3, 200, 2000])
def test_of_equally_frequent_followers_the_latest_comes_first(times: int) -> None:
    """However long the text is: 1 was followed by 2 and 3 equally often, by 3 last."""
    text = [1, 2, 1, 3, 0] * times + [1]
    method = methods.ngram(branches="2", longest=1)
    drafts, _ = _propose(method, _state([text]))
    assert drafts[0].tolist() == [3, 2]


def test_tokens_that_are_counted_together_stay_apart() -> None:
    """Followers are counted modulo 4096: the count may be wrong, a token never."""
    method = methods.ngram(branches="3", longest=1)
    drafts, _ = _propose(method, _state([[1, 5, 1, 4101, 1]]))
    assert drafts[0].tolist() == [4101, 5, -1]


def test_drafting_ends_where_nothing_is_known() -> None:
    # 1 2 was followed by 9 once; nothing followed 9 but the end of what it stands in.
    method = methods.ngram(drafts=4, longest=2)
    drafts, _ = _propose(method, _state([[9, 1, 2, 8, 1, 2]]))
    assert drafts[0].tolist() == [8, 1, 2, 8]
    drafts, _ = _propose(methods.prompt_lookup(4, 2), _state([[9, 1, 2, 8, 1, 2]]))
    assert drafts[0].tolist() == [8, 1, 2, -1]
