"""What a `--help` tells a user to type is there."""

import argparse
import ast
import re
from collections.abc import Iterator

import pytest

from mtd_jax.cli.main import make_parser
from tests.architecture.sources import ROOT, label, python_files, tree

CONFIG = re.compile(r"configs/[\w./*-]*[\w*]")


def helps(parser: argparse.ArgumentParser) -> Iterator[tuple[str, str]]:
    yield parser.prog, parser.format_help()
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for command in action.choices.values():
                yield from helps(command)


PROGRAMS = [
    (label(file), ast.get_docstring(tree(file)) or "")  # is the --help of those that have one
    for file in python_files("train", "infer", "benchmarks")
]


@pytest.mark.parametrize(
    ("name", "text"), [*helps(make_parser()), *PROGRAMS], ids=lambda s: s if len(s) < 60 else "text"
)
def test_configs_that_are_named_exist(name: str, text: str) -> None:
    for path in CONFIG.findall(text):
        assert list(ROOT.glob(path)), f"{name} names {path}"
