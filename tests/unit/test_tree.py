from __future__ import annotations

import re
from random import Random

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mtd_jax.decoding import tree as tree_module
from mtd_jax.decoding.tree import MAX_NODES, TokenTree, build_tree
from mtd_jax.errors import InputError
from mtd_jax.transformer import masks

Ranks = tuple[int, ...]


@st.composite
def trees(draw: st.DrawFn, max_drafts: int = 12) -> tuple[int, ...]:
    """Parents: beartype draws random numbers, which a strategy must not, so tests make the tree."""
    drafts = draw(st.integers(0, max_drafts))
    return tuple(draw(st.integers(0, node)) for node in range(drafts))


@st.composite
def accuracies(draw: st.DrawFn, max_depth: int = 3, max_ranks: int = 3) -> np.ndarray:
    depths, ranks = draw(st.integers(1, max_depth)), draw(st.integers(1, max_ranks))
    parts = st.lists(st.sampled_from([0.0, 0.05, 0.1, 0.3, 1.0]) | st.floats(0.01, 1.0))
    rows = []
    for _ in range(depths):
        row = sorted((draw(parts) + [0.0] * ranks)[:ranks], reverse=True)
        rows.append(np.array(row) / max(sum(row), 1.0))
    return np.array(rows)


def _way(tree: TokenTree, node: int) -> list[int]:
    """From the root to the node."""
    return [0] if node == 0 else [*_way(tree, tree.parents[node - 1]), node]


def _ranks(tree: TokenTree, node: int) -> Ranks:
    def rank(n: int) -> int:
        return tree.parents[: n - 1].count(tree.parents[n - 1])

    return tuple(rank(n) for n in _way(tree, node)[1:])


def _all_ranks(tree: TokenTree) -> set[Ranks]:
    return {_ranks(tree, node) for node in range(1, tree.size)}


def _expected(paths: set[Ranks], values: np.ndarray) -> float:
    """The root's token, and every node as often as all guesses up to it are right."""
    total = 1.0
    for path in paths:
        total += float(np.prod([values[depth, rank] for depth, rank in enumerate(path)]))
    return total


@given(trees())
def test_arrays_equal_their_definitions(parents: tuple[int, ...]) -> None:
    tree = TokenTree(parents)
    ways = [_way(tree, node) for node in range(tree.size)]
    assert tree.size == len(tree.parents) + 1
    assert tree.depth.tolist() == [len(way) - 1 for way in ways]
    assert tree.max_depth == max(len(way) for way in ways) - 1
    assert tree.rank.tolist() == [0, *(_ranks(tree, n)[-1] for n in range(1, tree.size))]
    for node, way in enumerate(ways):
        assert np.flatnonzero(tree.ancestors[node]).tolist() == way
        repeated = [node] * (tree.max_depth + 1 - len(way))
        assert tree.paths[node].tolist() == way + repeated
        hanging = [n for n in range(1, tree.size) if tree.parents[n - 1] == node]
        assert list(tree.children(node)) == hanging
        assert [int(tree.rank[n]) for n in hanging] == list(range(len(hanging)))
    assert tree.depth.dtype == tree.rank.dtype == tree.paths.dtype == np.int32
    assert tree.ancestors.dtype == np.bool_


@given(trees())
def test_equal_parents_are_one_static_argument(parents: tuple[int, ...]) -> None:
    tree = TokenTree(parents)
    other = TokenTree(tuple(tree.parents))
    assert tree == other
    assert hash(tree) == hash(other)
    assert tree.is_chain == (tree == TokenTree.chain(tree.size - 1))


@pytest.mark.parametrize("drafts", [0, 1, 5, MAX_NODES - 1])
def test_a_chain_is_a_tree_of_width_one(drafts: int) -> None:
    chain = TokenTree.chain(drafts)
    assert chain == TokenTree.branching(*[1] * drafts)
    assert chain.is_chain
    assert chain.size == drafts + 1
    assert chain.max_depth == drafts
    np.testing.assert_array_equal(chain.ancestors, np.tri(drafts + 1, dtype=bool))


@given(st.lists(st.integers(1, 3), max_size=4))
def test_branching_has_all_ranks_at_every_depth(widths: list[int]) -> None:
    tree = TokenTree.branching(*widths)
    for node in range(tree.size):
        depth = int(tree.depth[node])
        assert len(tree.children(node)) == (widths[depth] if depth < len(widths) else 0)
    assert tree.size == 1 + sum(int(np.prod(widths[: d + 1])) for d in range(len(widths)))
    assert TokenTree.from_paths([_ranks(tree, n) for n in range(1, tree.size)]) == tree


@given(trees(), st.randoms(use_true_random=False))
def test_paths_in_any_order_give_the_tree_back(parents: tuple[int, ...], random: Random) -> None:
    tree = TokenTree(parents)
    paths = sorted(_all_ranks(tree))
    random.shuffle(paths)
    again = TokenTree.from_paths([*paths, *paths[:2]])
    assert _all_ranks(again) == _all_ranks(tree)
    assert again.size == tree.size
    assert np.diff(again.depth).min(initial=0) >= 0
    assert TokenTree.from_paths([_ranks(again, n) for n in range(1, again.size)]) == again


@given(trees())
def test_the_drawing_is_the_mask(parents: tuple[int, ...]) -> None:
    tree = TokenTree(parents)
    seen: list[int] = []
    for line in tree.draw().split("\n"):
        found = re.fullmatch(r"[│├└─ ]*(\d+) +([x. ]+)", line)
        assert found, line
        node = int(found[1])
        seen.append(node)
        assert [mark == "x" for mark in found[2].split()] == tree.ancestors[node].tolist()
        # A node stands three columns to the right of its parent.
        assert found.start(1) == 3 * int(tree.depth[node])
    assert sorted(seen) == list(range(tree.size))
    for node in range(1, tree.size):
        assert seen.index(tree.parents[node - 1]) < seen.index(node)


def test_the_docstring_draws_what_it_says() -> None:
    lines = (tree_module.__doc__ or "").split("\n")
    start = next(i for i, line in enumerate(lines) if ">>>" in line)
    drawn = "\n".join(line[4:] for line in lines[start + 1 : start + 6])
    assert TokenTree.branching(2, 1).draw() == drawn


def test_the_mask_of_a_tree_is_as_drawn() -> None:
    lines = [x.split() for x in (masks.__doc__ or "").split("\n") if x.strip().startswith("node")]
    drawn = np.array([[cell == "x" for cell in line[2:]] for line in lines])
    tree = TokenTree((0, 0, 1))
    seen = masks.tree(jnp.array([2], jnp.int32), jnp.asarray(tree.ancestors)[None], 6)
    np.testing.assert_array_equal(seen[0], drawn)


@settings(max_examples=25)
@given(trees(max_drafts=5), st.lists(st.integers(0, 12), min_size=3, max_size=3))
def test_the_mask_shows_text_and_ancestors(parents: tuple[int, ...], committed: list[int]) -> None:
    """Also where the tree reaches beyond the last slot."""
    tree = TokenTree(parents)
    capacity = 14
    got = masks.tree(jnp.asarray(committed, jnp.int32), jnp.asarray(tree.ancestors)[None], capacity)
    for row, text in enumerate(committed):
        for node in range(tree.size):
            way = {text + n for n in _way(tree, node)}
            expected = [slot < text or slot in way for slot in range(capacity)]
            assert np.asarray(got)[row, node].tolist() == expected


@given(trees(max_drafts=8), accuracies(max_depth=8, max_ranks=8))
def test_expected_tokens_adds_up_chances(parents: tuple[int, ...], values: np.ndarray) -> None:
    tree = TokenTree(parents)
    values = np.pad(values, [(0, 8 - len(values)), (0, 8 - values.shape[1])])
    assert tree.expected_tokens(values) == pytest.approx(_expected(_all_ranks(tree), values))


def _best_of_all(values: np.ndarray, nodes: int) -> float:
    """Brute force over every set of paths that holds parents and elder siblings."""
    depths, ranks = values.shape
    grown: set[frozenset[Ranks]] = {frozenset()}
    best = 1.0
    for _ in range(nodes - 1):
        larger: set[frozenset[Ranks]] = set()
        for paths in grown:
            for parent in [(), *paths]:
                rank = sum(path[:-1] == parent for path in paths)
                if len(parent) < depths and rank < ranks:
                    larger.add(paths | {(*parent, rank)})
        grown = larger
        best = max([best, *(_expected(set(paths), values) for paths in grown)])
    return best


@settings(max_examples=60)
@given(accuracies(), st.integers(1, 6))
def test_no_tree_of_that_size_emits_more(values: np.ndarray, nodes: int) -> None:
    tree = build_tree(values, nodes)
    assert tree.size <= nodes
    best = _best_of_all(values, nodes)
    assert tree.expected_tokens(values) == pytest.approx(best, abs=1e-9)
    # Nodes that are never right are left out, all others are welcome.
    if tree.size < nodes:
        assert build_tree(values, 40).size == tree.size
    for node in range(1, tree.size):
        assert _expected({_ranks(tree, node)}, values) > 1.0


def test_a_tree_grows_where_chances_are() -> None:
    sure = np.array([[1.0, 0.0]] * 5)
    assert build_tree(sure, 4) == TokenTree.chain(3)
    assert build_tree(sure, 100) == TokenTree.chain(5)
    unsure = np.array([[0.4, 0.3, 0.2], [0.1, 0.1, 0.1]])
    assert build_tree(unsure, 4) == TokenTree.branching(3)
    for nodes in (0, 1):
        assert build_tree(sure, nodes).size == 1
    assert build_tree(np.zeros((3, 2)), 5).size == 1
    assert build_tree(np.zeros((0, 0)), 5).size == 1


@pytest.mark.parametrize("parents", [(1,), (-1,), (0, 2), (0, 1, 3), (0, 0, -2)])
def test_a_parent_comes_first(parents: tuple[int, ...]) -> None:
    with pytest.raises(InputError, match=f"node {len(parents)} of a tree hangs on {parents[-1]}"):
        TokenTree(parents)


def test_trees_have_a_greatest_size() -> None:
    assert TokenTree.chain(MAX_NODES - 1).size == MAX_NODES
    for make in (
        lambda: TokenTree.chain(MAX_NODES),
        lambda: TokenTree.branching(2, 2, 2, 2, 2, 2, 2, 2),
        lambda: TokenTree.from_paths([(rank,) for rank in range(MAX_NODES)]),
        lambda: build_tree(np.ones((300, 1)), 300),
    ):
        with pytest.raises(InputError, match=f"at most {MAX_NODES}"):
            make()


@pytest.mark.parametrize(
    ("paths", "named"),
    [
        ([(1,)], r"\(1,\)"),
        ([(0,), (1, 0)], r"\(1, 0\)"),
        ([(0,), (0, 1)], r"\(0, 1\)"),
        ([(0,), (2,)], r"\(2,\)"),
        ([(0,), (-1,)], r"\(-1,\)"),
        ([(0,), (0, -1)], r"\(0, -1\)"),
    ],
)
def test_paths_need_parents_and_elder_siblings(paths: list[Ranks], named: str) -> None:
    with pytest.raises(InputError, match=f"tree node {named} has no"):
        TokenTree.from_paths(paths)


def test_an_empty_path_is_bad_input_or_the_root() -> None:
    try:
        assert TokenTree.from_paths([(), (0,)]) == TokenTree.chain(1)
    except InputError as error:
        assert "()" in str(error)  # noqa: PT017


@pytest.mark.parametrize(
    ("values", "named"),
    [
        (np.zeros(3), "depth, rank"),
        (np.zeros((2, 2, 2)), "depth, rank"),
        (np.array([[0.5, np.nan]]), "depth, rank"),
        (np.array([[np.inf]]), "depth, rank"),
        (np.array([[0.5, -0.1]]), "at least 0"),
        (np.array([[0.5, 0.1], [0.6, 0.5]]), "more than 1"),
    ],
)
def test_bad_accuracies_are_refused(values: np.ndarray, named: str) -> None:
    with pytest.raises(InputError, match=named):
        build_tree(values, 4)


def test_noise_that_ascends_with_the_rank_is_levelled() -> None:
    noisy, level = np.array([[0.3, 0.35], [0.2, 0.1]]), np.array([[0.3, 0.3], [0.2, 0.1]])
    assert build_tree(noisy, 5) == build_tree(level, 5)
