"""Heads on disk: what is written comes back to the last bit, and nothing hostile comes in."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mtd_jax import load_heads, methods
from mtd_jax.convert.heads import describe_heads, save_heads, shipped_heads, stored_heads
from mtd_jax.convert.medusa_files import FILES, LAYOUTS, Layout, read_medusa, write_medusa
from mtd_jax.convert.safetensors_files import write_safetensors
from mtd_jax.errors import InputError
from tests.support import heads, tiny
from tests.support.training import assert_same_bits

MODEL = tiny.language_model()
WIDTH, VOCAB = MODEL.config.hidden_size, MODEL.config.vocab_size


@pytest.fixture(scope="module")
def stored(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return heads.write(heads.random(MODEL, count=2), tmp_path_factory.mktemp("stored") / "heads")


@pytest.mark.parametrize("own_output", [False, True])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_what_is_written_comes_back(tmp_path: Path, own_output: bool, dtype: str) -> None:
    made = heads.random(MODEL, count=2, own_output=own_output)
    made = dataclasses.replace(made, record={"accuracies": [[0.5, 0.2], [0.3, 0.1]], "steps": 3})
    save_heads(made, tmp_path / "a", dtype=jnp.dtype(dtype))
    written = [path for path in (tmp_path / "a").rglob("*") if path.is_file()]
    assert not any(str(tmp_path).encode() in path.read_bytes() for path in written)
    found = stored_heads(tmp_path / "a", MODEL)
    cast = jax.tree.map(lambda w: w.astype(dtype), made.weights)
    assert_same_bits(found.weights, cast)
    assert {str(leaf.dtype) for leaf in jax.tree.leaves(found.weights)} == {dtype}
    assert dataclasses.replace(found, weights=None) == dataclasses.replace(made, weights=None)
    loaded = load_heads(tmp_path / "a", MODEL)
    assert {leaf.dtype for leaf in jax.tree.leaves(loaded.weights)} == {np.dtype(np.float32)}
    facts = json.loads(json.dumps(describe_heads(tmp_path / "a")))
    assert facts["dtype"] == dtype
    assert facts["parameters"] == sum(leaf.size for leaf in jax.tree.leaves(made.weights))
    assert facts["shapes"]["weight"] == [WIDTH, 2, WIDTH]
    assert not [p for p in tmp_path.iterdir() if p.name != "a"]


def test_what_is_there_is_replaced_only_on_demand(tmp_path: Path) -> None:
    made = heads.random(MODEL, count=1)
    save_heads(made, tmp_path / "a")
    with pytest.raises(InputError, match="is there already"):
        save_heads(made, tmp_path / "a")
    save_heads(dataclasses.replace(made, record={"new": 1}), tmp_path / "a", force=True)
    assert stored_heads(tmp_path / "a", MODEL).record == {"new": 1}
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "diary.txt").write_text("dear", encoding="utf-8")
    with pytest.raises(InputError, match="holds no checkpoint"):
        save_heads(made, tmp_path / "mine", force=True)


def test_another_base_is_refused(stored: Path) -> None:
    other = dataclasses.replace(MODEL, fingerprint="0123456789abcdef")
    with pytest.raises(InputError, match="another base model"):
        load_heads(stored, other)
    assert shipped_heads("medusa", other) is None


def _edited(**changes: Any) -> Callable[[Path], None]:
    def damage(directory: Path) -> None:
        path = directory / "method.json"
        values = json.loads(path.read_text(encoding="utf-8")) | changes
        path.write_text(json.dumps(values), encoding="utf-8")

    return damage


def _truncated(directory: Path) -> None:
    largest = max((p for p in directory.rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)
    largest.write_bytes(largest.read_bytes()[:-7])


HOSTILE: dict[str, tuple[Callable[[Path], object], str]] = {
    "no method.json": (lambda d: (d / "method.json").unlink(), "no method.json"),
    "not JSON": (lambda d: (d / "method.json").write_text("{"), "cannot read"),
    "format": (_edited(format=9), "is not format 1"),
    "no weights": (lambda d: shutil.rmtree(d / "heads"), "settings without weights"),
    "truncated": (_truncated, "is truncated or was changed"),
    "no inventory": (_edited(files={}), "does not list the files"),
    "files elsewhere": (_edited(files={"../../x": [1, None]}), "lists '../../x' elsewhere"),
    "files": (_edited(files=[1]), "'files' an object"),
    "record": (_edited(record=[1]), "'record' must be an object"),
    "options": (_edited(options={"count": 4}), r"'weight' is \[32, 2, 32\], not \[32, 4"),
    "kind": (_edited(options={"count": "many"}), "option 'count' must be int"),
    "huge": (_edited(options={"count": 10**9}), "count must be between 1 and 16"),
    "key": (_edited(options={"cuont": 2}), "unknown option of method 'medusa' 'cuont'"),
    "list": (_edited(options={"own_output": []}), "must be true or false"),
    "method": (_edited(method="ngram", options={}), "has no trained heads"),
    "base": (_edited(base="else"), "another base model"),
    "dtype": (_edited(dtype=3), "'dtype' must be text"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_damage_is_one_line(stored: Path, tmp_path: Path, name: str) -> None:
    damage, words = HOSTILE[name]
    shutil.copytree(stored, tmp_path / "bad")
    damage(tmp_path / "bad")
    with pytest.raises(InputError, match=words) as caught:
        load_heads(tmp_path / "bad", MODEL)
    assert "\n" not in str(caught.value).strip()


@pytest.mark.parametrize(
    "accuracies",
    ["many", [0.5], [[0.5, float("nan")]], [[-0.1]], [[0.9, 0.9]], [[0.1], [0.1, 0.2]]],
)
def test_nonsense_accuracies_are_refused(accuracies: Any) -> None:
    made = dataclasses.replace(heads.random(MODEL), record={"accuracies": accuracies})
    with pytest.raises(InputError, match="accuracies"):
        methods.medusa(made)


def test_options_are_checked() -> None:
    made = heads.random(MODEL, count=2)
    for options, words in (
        ({"count": "3"}, "count of 'medusa' is what the heads were trained with"),
        ({"tree": "measured"}, "these heads carry none"),
        ({"tree": "1x1x1"}, "is 3 deep; the heads guess 2 places"),
        ({"tree": "2xx"}, "tree must be auto"),
        ({"tre": "chain"}, "did you mean 'tree'"),
        ({"acceptance": "exactly"}, "exact or typical"),
    ):
        with pytest.raises(InputError, match=words):
            methods.make_method("medusa", options, made)
    with pytest.raises(InputError, match="needs trained heads"):
        methods.make_method("medusa", {})
    assert methods.make_method("medusa", {"count": "2", "tree": "chain"}, made).max_emit == 3
    assert not methods.medusa(made, acceptance="typical").lossless


def _published(directory: Path, layout: Layout, **changes: np.ndarray | None) -> Path:
    """A look-alike of what others publish: PyTorch's [out, in] matrices, bfloat16."""
    rng = np.random.default_rng(0)
    weight, bias, output = LAYOUTS[layout]
    tensors: dict[str, np.ndarray] = {}
    for i in range(2):
        tensors[weight.format(i)] = rng.normal(size=(WIDTH, WIDTH))
        tensors[bias.format(i)] = rng.normal(size=WIDTH)
        tensors[output.format(i)] = rng.normal(size=(VOCAB, WIDTH))
    for name, value in changes.items():
        tensors.pop(name, None)
        if value is not None:
            tensors[name] = value
    directory.mkdir(parents=True)
    pairs = [(name, value.astype(jnp.bfloat16)) for name, value in tensors.items()]
    write_safetensors(directory / FILES[layout], pairs)
    return directory


@pytest.mark.parametrize("layout", LAYOUTS)
def test_published_heads_come_in_and_go_out(tmp_path: Path, layout: Layout) -> None:
    source = _published(tmp_path / "published", layout)
    found = read_medusa(source, MODEL)
    assert found.options == {"count": 2, "own_output": True}
    rng = np.random.default_rng(0)
    first = jnp.asarray(rng.normal(size=(WIDTH, WIDTH)), jnp.bfloat16)
    np.testing.assert_array_equal(found.weights.weight[:, 0], first.T)
    write_medusa(found, MODEL, tmp_path / "again", layout)
    assert (tmp_path / "again" / FILES[layout]).read_bytes() == (
        source / FILES[layout]
    ).read_bytes()
    save_heads(found, tmp_path / "native")
    assert_same_bits(stored_heads(tmp_path / "native", MODEL).weights, found.weights)
    method: Any = methods.make_method(
        "medusa", {"tree": "2x1"}, load_heads(source.parent / "native", MODEL)
    )
    h = jnp.ones((1, WIDTH), jnp.float32)
    assert method.logits(MODEL.params, h).shape == (1, 2, VOCAB)


def test_shared_outputs_are_written_as_copies(tmp_path: Path) -> None:
    made = heads.random(MODEL, count=2)
    write_medusa(made, MODEL, tmp_path / "out", "vllm")
    again = read_medusa(tmp_path / "out", MODEL)
    head = MODEL.params.embedding.T if MODEL.params.head is None else MODEL.params.head
    for matrix in again.weights.output:
        np.testing.assert_array_equal(matrix, head)
    np.testing.assert_array_equal(again.weights.weight, made.weights.weight)


def test_what_vllm_may_leave_out(tmp_path: Path) -> None:
    gone: dict[str, Any] = {f"blocks.{i}.layers.0.bias": None for i in range(2)}
    gone |= {f"lm_heads.{i}.weight": None for i in range(2)}
    one = np.random.default_rng(1).normal(size=(VOCAB, WIDTH))
    source = _published(tmp_path / "x", "vllm", **gone, **{"lm_head.weight": one})
    found = read_medusa(source, MODEL)
    assert float(jnp.abs(found.weights.bias).max()) == 0
    np.testing.assert_array_equal(found.weights.output[0], found.weights.output[1])


def test_foreign_files_are_refused(tmp_path: Path) -> None:
    square = np.zeros((WIDTH, WIDTH))
    cases: dict[str, tuple[dict[str, Any], str]] = {
        "two blocks": ({"0.1.linear.weight": square}, "heads of one block"),
        "missing": ({"1.1.weight": None}, "lacks 1.1.weight"),
        "shape": ({"0.1.weight": square}, r"not \[97, 32\] as for the base"),
        "nan": ({"0.0.linear.weight": square * np.nan}, "NaN"),
        "none": ({"0.0.linear.weight": None}, "holds no Medusa heads"),
    }
    for name, (changes, words) in cases.items():
        source = _published(tmp_path / name, "original", **changes)
        with pytest.raises(InputError, match=words):
            read_medusa(source, MODEL)
    twice = _published(tmp_path / "twice", "original", **{"1.1.weight": None})
    (file,) = twice.glob("*.safetensors")
    file.rename(twice / "a.safetensors")
    shutil.copyfile(twice / "a.safetensors", twice / "b.safetensors")
    with pytest.raises(InputError, match=r"'0.0.linear.bias' is in both a.*lacks 1\.1\.weight"):
        read_medusa(twice, MODEL)
    (tmp_path / "pickled").mkdir()
    (tmp_path / "pickled" / "medusa_lm_head.pt").write_bytes(b"x")
    for path in (tmp_path / "pickled", tmp_path / "pickled" / "medusa_lm_head.pt"):
        with pytest.raises(InputError, match="pickled weights"):
            read_medusa(path, MODEL)
    with pytest.raises(InputError, match="no heads at"):
        read_medusa(tmp_path / "nowhere", MODEL)
