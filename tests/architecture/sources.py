"""The project's own Python files, for the tests that read source text."""

import ast
import functools
import pathlib

ROOT = pathlib.Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "mtd_jax"
FOLDERS = ("mtd_jax", "train", "infer", "tests", "benchmarks")


def python_files(*folders: str) -> list[pathlib.Path]:
    """Every Python file of the given folders that exist (of all folders, if none is given)."""
    found = [file for name in folders or FOLDERS for file in (ROOT / name).rglob("*.py")]
    return sorted(file for file in found if "__pycache__" not in file.parts)


def label(file: pathlib.Path) -> str:
    """The file's path from the repository root, as test id and in messages."""
    return file.relative_to(ROOT).as_posix()


def module_name(file: pathlib.Path) -> str:
    """`mtd_jax/cli/main.py` -> `mtd_jax.cli.main`; a package's `__init__.py` is the package."""
    parts = file.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


@functools.cache
def tree(file: pathlib.Path) -> ast.Module:
    """The file's syntax tree."""
    return ast.parse(file.read_text(encoding="utf-8"), filename=str(file))
