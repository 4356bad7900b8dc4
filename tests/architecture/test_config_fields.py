"""Every field of a config reaches the code that it is meant for.

This error has shipped elsewhere: `rope_theta` stood in the config and was never passed to RoPE.
"""

import ast
import dataclasses
from pathlib import Path

import pytest

from mtd_jax.config import CycleConfig, ModelConfig, RopeConfig
from mtd_jax.training import config as training
from tests.architecture.sources import PACKAGE, python_files, tree

CONFIG_FILE, TRAINING_FILE = PACKAGE / "config.py", PACKAGE / "training" / "config.py"
# Who holds a config: anything called so (`config.x`, `state.config.x`), a parameter or a field that
# is annotated with the class, and a variable assigned from one of them. Names of fields alone would
# also match the attributes of other things. Models and training runs both call theirs `config`: of
# a run's, only annotations count.
NAMES: dict[str, set[str]] = {
    "ModelConfig": {"config"},
    "RopeConfig": {"rope"},
    "CycleConfig": {"cycles"},
    "TrainConfig": set(),
}


def own_file(class_name: str) -> Path:
    return TRAINING_FILE if class_name == "TrainConfig" else CONFIG_FILE


def last_name(node: ast.expr) -> str:
    """The `c` of `a.b._c`."""
    return (node.attr if isinstance(node, ast.Attribute) else getattr(node, "id", "")).lstrip("_")


def holders(module: ast.Module, class_name: str) -> set[str]:
    """Names in a file that stand for a config of that class."""
    names = set(NAMES[class_name])
    for node in ast.walk(module):
        annotation = getattr(node, "annotation", None)
        if annotation is None or last_name(annotation) != class_name:
            continue
        if isinstance(node, ast.arg):
            names.add(node.arg)
        elif isinstance(node, ast.AnnAssign):
            names.add(last_name(node.target))
    for node in ast.walk(module):
        if isinstance(node, ast.Assign) and last_name(node.value) in names:
            names.update(last_name(target) for target in node.targets)
    return names


def attributes_of(node: ast.AST, names: set[str]) -> set[str]:
    """What is loaded from any of `names` under a node."""
    return {
        inner.attr
        for inner in ast.walk(node)
        if isinstance(inner, ast.Attribute)
        and isinstance(inner.ctx, ast.Load)
        and last_name(inner.value) in names
    }


def properties_of(class_name: str) -> dict[str, set[str]]:
    """Property of a config class -> the fields and properties of `self` that it reads."""
    (definition,) = (
        node
        for node in tree(own_file(class_name)).body
        if isinstance(node, ast.ClassDef) and node.name == class_name
    )
    return {
        method.name: attributes_of(method, {"self"})
        for method in definition.body
        if isinstance(method, ast.FunctionDef)
        and any(
            getattr(d, "id", getattr(d, "attr", "")) in ("property", "cached_property")
            for d in method.decorator_list
        )
    }


def names_read(class_name: str) -> set[str]:
    """Fields read outside the class's file, directly or through a property that is read there."""
    files = [file for file in python_files("mtd_jax") if file != own_file(class_name)]
    read = {name for f in files for name in attributes_of(tree(f), holders(tree(f), class_name))}
    properties = properties_of(class_name)
    while new := {n for p in read & properties.keys() for n in properties[p]} - read:
        read |= new
    return read


@pytest.mark.parametrize("cls", [ModelConfig, RopeConfig, CycleConfig, training.TrainConfig])
def test_every_field_is_read(cls: type) -> None:
    fields = {field.name for field in dataclasses.fields(cls)}
    unread = sorted(fields - names_read(cls.__name__))
    assert not unread, f"{cls.__name__}: nothing outside its file reads {', '.join(unread)}"


def test_holders_are_recognised() -> None:
    module = ast.parse("def f(c: ModelConfig, x): d = c; return d.num_layers + x.head_dim")
    assert attributes_of(module, holders(module, "ModelConfig")) == {"num_layers"}
    source = "class Run:\n  config: TrainConfig\ndef f(r): return r.config.out, r.other.x"
    module = ast.parse(source)
    assert attributes_of(module, holders(module, "TrainConfig")) == {"out"}


@pytest.mark.parametrize("cls", [ModelConfig, RopeConfig, CycleConfig])
def test_configs_are_frozen_and_hashable(cls: type) -> None:
    assert cls.__dataclass_params__.frozen  # type: ignore[attr-defined]
    assert cls.__hash__ is not None


TABLES = {
    "data": training.DataConfig,
    "optimizer": training.OptimizerConfig,
    "memory": training.MemoryConfig,
    "mesh": training.MeshConfig,
    "checkpoint": training.CheckpointConfig,
    "evaluate": training.EvaluateConfig,
    "log": training.LogConfig,
}


@pytest.mark.parametrize("table", TABLES)
def test_every_key_of_a_training_config_is_read(table: str) -> None:
    """Read as `config.data.length`, `data.length`, or `config.length` where only the table goes."""
    files = [file for file in python_files("mtd_jax") if file != TRAINING_FILE]
    read = {n for f in files for n in attributes_of(tree(f), {table, "config"})}
    fields = {field.name for field in dataclasses.fields(TABLES[table])}
    assert not fields - read, f"[{table}]: nothing reads {', '.join(sorted(fields - read))}"


def test_every_table_of_a_training_config_is_walked() -> None:
    kinds = {f.name for f in dataclasses.fields(training.TrainConfig) if "Config" in str(f.type)}
    assert kinds == TABLES.keys()
