"""Token trees: which drafts hang on which, as static arrays that one forward pass verifies at once.

Node 0 is the newest token of the text; every other node is a guess at what follows its parent. The
shape is fixed when a program is compiled, the tokens on it are not. A chain is a tree of width one.

    >>> print(TokenTree.branching(2, 1).draw())
    0         x . . . .
    ├─ 1      x x . . .
    │  └─ 3   x x . x .
    └─ 2      x . x . .
       └─ 4   x . x . x

The right half is the mask: which nodes (columns) a node (row) sees.
"""

from __future__ import annotations

import dataclasses
import functools
import heapq
from collections.abc import Sequence

import numpy as np

from mtd_jax.errors import InputError

MAX_NODES = 256
"""More rows than this cost more than any acceptance brings, on every machine known to us."""


@dataclasses.dataclass(frozen=True)
class TokenTree:
    """The shape of a tree; hashable, so it can be static under jit.

    Raises:
      InputError: `parents` are no tree in which a parent comes before its children, or it has too
        many nodes.
    """

    parents: tuple[int, ...]
    """Of nodes 1, 2, ...: the node that each hangs on. Siblings are ranked in their order."""

    def __post_init__(self) -> None:
        if len(self.parents) >= MAX_NODES:
            raise InputError(f"a tree of {len(self.parents) + 1} nodes; at most {MAX_NODES}")
        for node, parent in enumerate(self.parents, start=1):
            if not 0 <= parent < node:
                raise InputError(f"node {node} of a tree hangs on {parent}, which is not before it")

    @classmethod
    def chain(cls, drafts: int) -> TokenTree:
        """`drafts` guesses, one after the other."""
        return cls(tuple(range(drafts)))

    @classmethod
    def branching(cls, *widths: int) -> TokenTree:
        """Every node at depth d has `widths[d]` children.

        Raises:
          InputError: a width under 1, or too many nodes.
        """
        parents: list[int] = []
        level = [0]
        for width in widths:
            if width < 1 or len(level) * width >= MAX_NODES:
                raise InputError(f"a tree's widths are 1 or more, its nodes at most {MAX_NODES}")
            parents += [node for node in level for _ in range(width)]
            level = list(range(len(parents) + 1 - len(level) * width, len(parents) + 1))
        return cls(tuple(parents))

    @classmethod
    def from_paths(cls, paths: Sequence[Sequence[int]]) -> TokenTree:
        """From the ranks on the way to each node, as Medusa lists them: (0,), (0, 0), (1,), ...

        Raises:
          InputError: a node whose parent or elder sibling is not listed.
        """
        chosen = {tuple(path) for path in paths if len(path)}
        ordered = sorted(chosen, key=lambda path: (len(path), path))
        nodes: dict[tuple[int, ...], int] = {(): 0}
        for path in ordered:
            elder = (*path[:-1], path[-1] - 1)
            if path[:-1] not in nodes or (path[-1] > 0 and elder not in nodes) or path[-1] < 0:
                raise InputError(f"tree node {path} has no parent or no elder sibling")
            nodes[path] = len(nodes)
        return cls(tuple(nodes[path[:-1]] for path in ordered))

    @property
    def size(self) -> int:
        """M: nodes, the root included; rows of a verifying pass."""
        return len(self.parents) + 1

    @property
    def max_depth(self) -> int:
        """The most drafts that can be accepted at once."""
        return int(self.depth.max())

    @property
    def is_chain(self) -> bool:
        """Whether every node hangs on the one before it."""
        return self.parents == tuple(range(len(self.parents)))

    @functools.cached_property
    def depth(self) -> np.ndarray:
        """[M] int32: ancestors of each node."""
        depth = np.zeros(self.size, np.int32)
        for node, parent in enumerate(self.parents, start=1):
            depth[node] = depth[parent] + 1
        return depth

    @functools.cached_property
    def rank(self) -> np.ndarray:
        """[M] int32: elder siblings of each node."""
        seen: dict[int, int] = {}
        rank = np.zeros(self.size, np.int32)
        for node, parent in enumerate(self.parents, start=1):
            rank[node] = seen.get(parent, 0)
            seen[parent] = rank[node] + 1
        return rank

    @functools.cached_property
    def ancestors(self) -> np.ndarray:
        """[M, M] bool: `ancestors[m, a]` where a is m or lies on the way to it."""
        sees = np.eye(self.size, dtype=np.bool_)
        for node, parent in enumerate(self.parents, start=1):
            sees[node] |= sees[parent]
        return sees

    @functools.cached_property
    def paths(self) -> np.ndarray:
        """[M, max_depth + 1] int32: the nodes from the root to each node, which then repeats."""
        paths = np.zeros((self.size, self.max_depth + 1), np.int32)
        for node in range(self.size):
            way = np.flatnonzero(self.ancestors[node])
            paths[node] = node
            paths[node, : len(way)] = way
        return paths

    def children(self, node: int) -> tuple[int, ...]:
        """The nodes that hang on `node`, by rank."""
        return tuple(i for i, parent in enumerate(self.parents, start=1) if parent == node)

    def draw(self) -> str:
        """The tree with its mask, for people."""
        lines: list[tuple[str, int]] = []

        def visit(node: int, lead: str, below: str) -> None:
            lines.append((f"{lead}{node}", node))
            for child in self.children(node):
                last = child == self.children(node)[-1]
                corner, bar = ("└─ ", "   ") if last else ("├─ ", "│  ")
                visit(child, below + corner, below + bar)

        visit(0, "", "")
        width = max(len(text) for text, _ in lines) + 3
        marks = [
            " ".join("x" if self.ancestors[node, other] else "." for other in range(self.size))
            for _, node in lines
        ]
        return "\n".join(
            f"{text:<{width}}{mark}" for (text, _), mark in zip(lines, marks, strict=True)
        )

    def expected_tokens(self, accuracies: np.ndarray) -> float:
        """Tokens that a step emits on average, the bonus token included.

        Args:
          accuracies: [depth, rank]: how often the guess of that rank is the right one, given that
            everything before it was right. Guesses of one node exclude each other. At least as deep
          and as wide as the tree.
        """
        return 1.0 + float(sum(self._chance(accuracies, node) for node in range(1, self.size)))

    def _chance(self, accuracies: np.ndarray, node: int) -> float:
        way = [n for n in self.paths[node] if n > 0]
        return float(
            np.prod([accuracies[self.depth[n] - 1, self.rank[n]] for n in dict.fromkeys(way)])
        )


def build_tree(accuracies: np.ndarray, nodes: int) -> TokenTree:
    """The tree of `nodes` nodes (the root included) that emits most tokens a step.

    Greedy: each time the node most likely to be accepted is added, whose chance is the product of
    the accuracies on its way (Medusa, arXiv 2401.10774, section 2.3.3). That is optimal, because a
    node's chance is never over its parent's. Fewer nodes come back where chances reach zero.

    Args:
      accuracies: as in `TokenTree.expected_tokens`; a rank that seems better than the one before
        it is taken for no better.
    """
    accuracies = _checked(accuracies)
    depths, ranks = accuracies.shape
    chosen: list[tuple[int, ...]] = []
    waiting: list[tuple[float, tuple[int, ...]]] = []

    def offer(path: tuple[int, ...], parents_chance: float) -> None:
        if len(path) <= depths and path[-1] < ranks:
            chance = parents_chance * float(accuracies[len(path) - 1, path[-1]])
            if chance > 0:
                heapq.heappush(waiting, (-chance, path))

    offer((0,), 1.0)
    while waiting and len(chosen) < nodes - 1:
        chance, path = heapq.heappop(waiting)
        chosen.append(path)
        offer((*path, 0), -chance)
        own = float(accuracies[len(path) - 1, path[-1]])
        offer((*path[:-1], path[-1] + 1), -chance / own)
    return TokenTree.from_paths(chosen)


def _checked(accuracies: np.ndarray) -> np.ndarray:
    values = np.asarray(accuracies, np.float64)
    if values.ndim != 2 or not np.isfinite(values).all() or values.min(initial=0) < 0:
        raise InputError("accuracies of a tree must be [depth, rank] numbers of at least 0")
    if values.sum(axis=1).max(initial=0) > 1 + 1e-6:
        raise InputError("accuracies of one depth must not add up to more than 1")
    # Noise of the measurement: a later guess is not better than an earlier one.
    return np.minimum.accumulate(values, axis=1)
