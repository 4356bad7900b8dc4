"""What every source file must keep to: its length, its comments, its docstrings."""

import ast
import io
import pathlib
import re
import tokenize
from collections.abc import Iterator

import pytest

from tests.architecture.sources import FOLDERS, label, python_files, tree

MAX_LINES = 400
UNFINISHED = re.compile(r"\b(TODO|FIXME|XXX|HACK)\b")
BARE_IGNORE = re.compile(r"type:\s*ignore(?!\[)|noqa(?!:\s*[A-Z])")

Definition = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef

every_file = pytest.mark.parametrize("file", python_files(), ids=label)
every_public_file = pytest.mark.parametrize(
    "file", python_files("mtd_jax", "train", "infer"), ids=label
)


def comments(text: str) -> Iterator[tuple[int, str]]:
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type == tokenize.COMMENT:
            yield token.start[0], token.string


def public_definitions(body: list[ast.stmt], prefix: str = "") -> Iterator[tuple[str, Definition]]:
    """Module-level functions and classes, and methods and properties of those classes."""
    for node in body:
        if isinstance(node, Definition) and not node.name.startswith("_"):
            yield prefix + node.name, node
            if isinstance(node, ast.ClassDef):
                yield from public_definitions(node.body, f"{prefix}{node.name}.")


def is_overload_or_setter(node: Definition) -> bool:
    """These share the docstring of the definition that they belong to."""
    decorators = [ast.unparse(decorator) for decorator in node.decorator_list]
    return any(d.endswith((".setter", ".deleter", "overload")) for d in decorators)


def test_files_are_found() -> None:
    """Guards the tests below against an empty list."""
    assert len(python_files("mtd_jax")) >= 5
    assert len(python_files("tests")) >= 3
    assert set(FOLDERS) >= {"mtd_jax", "tests"}


@every_file
def test_is_read_in_one_sitting(file: pathlib.Path) -> None:
    lines = len(file.read_text(encoding="utf-8").splitlines())
    assert lines <= MAX_LINES, f"{label(file)} has {lines} lines, {MAX_LINES} are the most: split"


@every_file
def test_nothing_unfinished_and_no_blanket_ignore(file: pathlib.Path) -> None:
    bad = [
        f"{label(file)}:{line}: {comment}"
        for line, comment in comments(file.read_text(encoding="utf-8"))
        if UNFINISHED.search(comment) or BARE_IGNORE.search(comment)
    ]
    assert not bad, "\n".join(bad)


@every_public_file
def test_public_names_have_docstrings(file: pathlib.Path) -> None:
    module = tree(file)
    bare = [] if ast.get_docstring(module) else [f"{label(file)}: the module"]
    bare += [
        f"{label(file)}:{node.lineno}: {name}"
        for name, node in public_definitions(module.body)
        if not ast.get_docstring(node) and not is_overload_or_setter(node)
    ]
    assert not bare, "without docstring:\n" + "\n".join(bare)


@pytest.mark.parametrize(
    ("comment", "is_bad"),
    [
        ("# type: ignore", True),
        ("# type: ignore[arg-type]", False),
        ("# noqa", True),
        ("# noqa: E402", False),
        ("# TO" + "DO later", True),
        ("# the mastodon of caches", False),
    ],
)
def test_the_patterns_themselves(comment: str, is_bad: bool) -> None:
    assert bool(UNFINISHED.search(comment) or BARE_IGNORE.search(comment)) == is_bad
