"""The native checkpoint: whole or not there, and exactly what was saved."""

import json
import os
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest

from mtd_jax.convert import native
from mtd_jax.convert.atomic import atomic_directory
from mtd_jax.convert.conversions import save_native, to_native
from mtd_jax.convert.load import load, load_as_stored
from mtd_jax.convert.summary import summarize
from mtd_jax.errors import InputError
from mtd_jax.sharding import make_mesh
from tests.support import tiny
from tests.support.checkpoints import hf_config, write_hf
from tests.support.tokenizers import byte_level


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    source = write_hf(tmp_path / "source", hf_config("qwen3"))
    byte_level().save(source)
    to_native(source, tmp_path / "native", note="for tests")
    return tmp_path / "native"


def assert_same(one: object, other: object) -> None:
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(a, b)


def test_what_was_saved_is_loaded(checkpoint: Path) -> None:
    source, loaded = load_as_stored(checkpoint.parent / "source"), load_as_stored(checkpoint)
    assert loaded.config == source.config
    assert loaded.fingerprint == source.fingerprint
    assert loaded.source == "Hugging Face checkpoint source; for tests"
    assert_same(loaded.params, source.params)
    assert loaded.tokenizer is not None
    assert source.tokenizer is not None
    assert loaded.tokenizer.encode("the fox") == source.tokenizer.encode("the fox")


def test_a_model_prepared_for_decoding_is_saved_as_declared(checkpoint: Path) -> None:
    save_native(load(checkpoint), checkpoint.parent / "again")
    assert_same(
        load_as_stored(checkpoint.parent / "again").params, load_as_stored(checkpoint).params
    )


def test_without_tokenizer(tmp_path: Path) -> None:
    model = tiny.language_model()
    save_native(model, tmp_path / "out")
    loaded = load_as_stored(tmp_path / "out")
    assert loaded.tokenizer is None
    assert loaded.source == "random"
    assert_same(loaded.params, model.params)


@pytest.mark.parametrize("sizes", [{"tensor": 2, "fsdp": 2}, {"data": 8}])
def test_restored_onto_a_mesh(checkpoint: Path, sizes: dict[str, int]) -> None:
    mesh = make_mesh(sizes)
    loaded = load_as_stored(checkpoint, mesh=mesh)
    assert loaded.mesh == mesh
    assert loaded.params.embedding.sharding.mesh.shape == mesh.shape
    assert_same(loaded.params, load_as_stored(checkpoint).params)


def test_cast_when_loaded(checkpoint: Path) -> None:
    assert str(load(checkpoint, dtype="bfloat16").params.head.dtype) == "bfloat16"
    to_native(checkpoint, checkpoint.parent / "half", dtype="bfloat16")
    assert str(load_as_stored(checkpoint.parent / "half").params.head.dtype) == "bfloat16"
    assert str(load(checkpoint.parent / "half").params.head.dtype) == "float32"


def test_an_existing_checkpoint_is_kept_unless_forced(checkpoint: Path) -> None:
    before = (checkpoint / "config.json").read_text()
    source = write_hf(checkpoint.parent / "other")
    with pytest.raises(InputError, match=r"is there already \(--force"):
        to_native(source, checkpoint)
    assert (checkpoint / "config.json").read_text() == before
    to_native(source, checkpoint, force=True)
    assert load(checkpoint).config.family == "llama"
    assert not (checkpoint / "tokenizer.json").exists()
    assert sorted(p.name for p in checkpoint.parent.iterdir()) == ["native", "other", "source"]


def test_force_replaces_checkpoints_only(tmp_path: Path) -> None:
    source = write_hf(tmp_path / "source")
    precious = tmp_path / "home"
    precious.mkdir()
    (precious / "letter.txt").write_text("dear")
    with pytest.raises(InputError, match="no checkpoint"):
        to_native(source, precious, force=True)
    assert (precious / "letter.txt").read_text() == "dear"
    (tmp_path / "file").write_text("x")
    with pytest.raises(InputError, match="no directory"):
        to_native(source, tmp_path / "file", force=True)
    (tmp_path / "empty").mkdir()
    to_native(source, tmp_path / "empty")
    assert native.is_native(tmp_path / "empty")


@pytest.mark.parametrize("out", ["source", "source/inside", "."])
def test_source_and_result_lie_apart(tmp_path: Path, out: str) -> None:
    write_hf(tmp_path / "source")
    with pytest.raises(InputError, match="lie in each other"):
        to_native(tmp_path / "source", tmp_path / out, force=True)


def test_parents_are_made(tmp_path: Path) -> None:
    to_native(write_hf(tmp_path / "source"), tmp_path / "a" / "b" / "c")
    assert native.is_native(tmp_path / "a" / "b" / "c")


def test_an_error_leaves_nothing(tmp_path: Path) -> None:
    def fail() -> None:
        with atomic_directory(tmp_path / "out") as work:
            (work / "half").write_text("half")
            raise RuntimeError("in the middle")

    with pytest.raises(RuntimeError, match="in the middle"):
        fail()
    assert list(tmp_path.iterdir()) == []


def test_leftovers_of_dead_processes_are_removed(tmp_path: Path) -> None:
    dead = tmp_path / ".out.part-999999999-0123abcd"
    alive = tmp_path / f".out.part-{os.getpid()}-0123abcd"
    other = tmp_path / ".other.part-999999999-0123abcd"
    for path in (dead, alive, other):
        path.mkdir()
    with atomic_directory(tmp_path / "out"):
        pass
    assert not dead.exists()
    assert alive.exists()
    assert other.exists()


def test_a_checkpoint_being_replaced_when_killed_is_put_back(tmp_path: Path) -> None:
    to_native(write_hf(tmp_path / "source"), tmp_path / "out")
    (tmp_path / "out").rename(tmp_path / ".out.part-999999999-0123abcd-old")
    with pytest.raises(InputError, match="is there already"):
        to_native(tmp_path / "source", tmp_path / "out")
    assert native.is_native(tmp_path / "out")


def test_missing_weights_are_refused(checkpoint: Path) -> None:
    shutil.rmtree(checkpoint / "params")
    with pytest.raises(InputError, match=r"params/.* is missing"):
        load(checkpoint)


def test_every_file_may_be_truncated_or_gone(checkpoint: Path) -> None:
    files = [p for p in (checkpoint / "params").rglob("*") if p.is_file()]
    assert files
    for file in files:
        content = file.read_bytes()
        changed = content[:-1] + bytes([content[-1] ^ 1])  # another byte whatever it was
        for damaged in (None, content[: len(content) // 2], b"", changed):
            file.unlink()
            if damaged is not None:
                file.write_bytes(damaged)
            with pytest.raises(InputError, match=r"is missing|is truncated or was changed"):
                load(checkpoint)
            file.write_bytes(content)
    load(checkpoint)


def test_weights_of_another_model_are_refused(checkpoint: Path) -> None:
    values = json.loads((checkpoint / "config.json").read_text())
    values["model"] |= {"intermediate_size": 64, "qkv_bias": True}
    (checkpoint / "config.json").write_text(json.dumps(values))
    with pytest.raises(InputError) as caught:
        load(checkpoint)
    assert "'blocks.qkv_bias' is missing" in str(caught.value)
    assert "'blocks.down' is [3, 48, 32], not [3, 64, 32]" in str(caught.value)
    assert "more" not in str(caught.value)


def test_a_list_of_problems_that_is_cut_says_so(checkpoint: Path) -> None:
    """All arrays have another shape, and one is missing."""
    values = json.loads((checkpoint / "config.json").read_text())
    values["model"] |= {"num_layers": 2, "hidden_size": 64, "qkv_bias": True}
    (checkpoint / "config.json").write_text(json.dumps(values))
    with pytest.raises(InputError, match="does not fit") as caught:
        load(checkpoint)
    assert str(caught.value).endswith(" and 4 more")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"version": 2}, "version 2"),
        ({"version": None}, "version None"),
        ({"model": []}, "no 'model' object"),
        ({"model": {"family": "llama"}}, "lacks vocab_size"),
        ({"model": {"famly": "llama"}}, "did you mean 'family'"),
        ({"dtype": "float8"}, "unknown dtype 'float8'"),
        ({"fingerprint": 3}, "'fingerprint' must be text"),
        ({"files": None}, "does not list"),
        ({"files": {"../config.json": [1, None]}}, "elsewhere"),
    ],
)
def test_a_config_that_is_not_ours_is_refused(
    checkpoint: Path, change: dict[str, object], message: str
) -> None:
    values = json.loads((checkpoint / "config.json").read_text())
    (checkpoint / "config.json").write_text(json.dumps(values | change))
    with pytest.raises(InputError, match=message):
        load(checkpoint)


def test_summary_reads_no_weights(checkpoint: Path) -> None:
    native_summary = summarize(checkpoint)
    shutil.rmtree(checkpoint / "params")
    assert summarize(checkpoint) == native_summary
    hf_summary = summarize(checkpoint.parent / "source", with_fingerprint=True)
    for key in ("family", "parameters", "dtype", "bytes", "model", "shapes", "fingerprint"):
        assert hf_summary[key] == native_summary[key]
    assert summarize(checkpoint.parent / "source")["fingerprint"] is None
    assert native_summary["parameters"] == sum(
        int(np.prod(shape)) for shape in native_summary["shapes"].values()
    )


def test_a_similar_path_is_named(checkpoint: Path) -> None:
    with pytest.raises(InputError, match="did you mean 'native'"):
        load(checkpoint.with_name("natve"))
