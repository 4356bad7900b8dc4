"""Which way imports point, and what is never imported."""

import ast
import pathlib
import subprocess
import sys

import pytest

from tests.architecture.sources import ROOT, label, module_name, python_files, tree

HEAVY = ("torch", "tensorflow")
IMPORT_EVERYTHING = """
import importlib, sys
for name in sys.argv[1:]:
    importlib.import_module(name)
"""
HELP = """
import sys
from mtd_jax.cli.main import main
sys.argv = ["mtd", "--help"]
try:
    code = main()
except SystemExit as stop:
    code = stop.code
assert not code, code
"""
REPORT = f"""
loaded = [name for name in {HEAVY!r} if name in sys.modules]
assert not loaded, f"imported: {{loaded}}"
"""


def run_and_look(code: str, *arguments: str) -> str:
    """Runs `code` in a fresh interpreter and fails if a heavy framework was imported on the way."""
    child = subprocess.run(
        [sys.executable, "-c", code + REPORT, *arguments],
        cwd=ROOT, capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert child.returncode == 0, child.stderr[-4000:]
    return child.stdout


def test_layers_hold() -> None:
    """The contracts in pyproject.toml, through import-linter's own API."""
    from importlinter.cli import lint_imports

    assert lint_imports(config_filename=str(ROOT / "pyproject.toml"), no_cache=True) == 0


def test_help_imports_no_other_framework() -> None:
    assert "generate" in run_and_look(HELP)


def test_no_module_imports_another_framework() -> None:
    """All modules together. Several parts of `transformers` import torch wherever it is there."""
    names = [module_name(file) for file in python_files("mtd_jax")]
    run_and_look(IMPORT_EVERYTHING, *[name for name in names if not name.endswith("__main__")])


@pytest.mark.parametrize("file", python_files("tests"), ids=label)
def test_torch_is_imported_late_and_under_its_marker(file: pathlib.Path) -> None:
    """Without torch a marked test is deselected; an import on top would break the collection."""
    module = tree(file)
    early = [node.lineno for node in module.body if imports_torch(node)]
    assert not early, f"{label(file)}:{early}: import torch inside the function that uses it"
    if not file.name.startswith("test_") or "mark.torch" in module_marks(module):
        return
    unmarked = [
        f"{label(file)}:{node.lineno}: {node.name}"
        for node in ast.walk(module)
        if isinstance(node, ast.FunctionDef)
        and any(imports_torch(inner) for inner in ast.walk(node))
        and not any(ast.unparse(d).startswith("pytest.mark.torch") for d in node.decorator_list)
    ]
    assert not unmarked, "uses torch without @pytest.mark.torch:\n" + "\n".join(unmarked)


def imports_torch(node: ast.AST) -> bool:
    if isinstance(node, ast.Import):
        return any(alias.name.split(".")[0] == "torch" for alias in node.names)
    return isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "torch"


def module_marks(module: ast.Module) -> str:
    """The source of the module's `pytestmark`, or nothing."""
    for node in module.body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "pytestmark":
            return ast.unparse(node.value)
    return ""
