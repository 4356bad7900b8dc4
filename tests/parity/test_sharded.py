"""Models on eight simulated devices: same logits, same tokens, same files written.

With sizes of which meshes divide all, some, or next to none; the models of test_matrix.py run on
meshes there.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file

import mtd_jax as mtd
from mtd_jax.convert.conversions import save_native, to_huggingface
from mtd_jax.convert.huggingface import write_huggingface
from mtd_jax.convert.load import load_as_stored
from mtd_jax.decoding.method import Method
from mtd_jax.sharding import make_mesh, parse_mesh
from tests.support import hf
from tests.support.cached import cached_logits
from tests.support.meshes import MESHES

# Sizes that every mesh divides; sizes of which some divide; next to none, as in SmolLM2; and one
# head of keys and values, which no mesh divides, for many of queries.
SIZES: dict[str, dict[str, Any]] = {
    "all-divide": {"num_attention_heads": 8, "num_key_value_heads": 8, "head_dim": 8},
    "two-kv-heads": {"num_attention_heads": 8, "num_key_value_heads": 2, "head_dim": 16},
    "three-kv-heads": {
        "hidden_size": 90,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "head_dim": 10,
        "intermediate_size": 100,
        "vocab_size": 131,
    },
    "one-kv-head": {"num_attention_heads": 8, "num_key_value_heads": 1, "head_dim": 16},
}
MANY_HEADS = [sizes for sizes in SIZES if sizes != "one-kv-head"]
LOGITS = 1e-4
KL = 0.015
NEW_TOKENS = 8
TEXTS = hf.prompt(rows=8).astype(np.int32)
AR = mtd.methods.autoregressive()


def _rows() -> Iterator[tuple[str, ...]]:
    for family in hf.FAMILIES:
        yield from itertools.product(
            (family,), SIZES, hf.TIED, hf.ROPES, hf.WINDOWS[family], MESHES
        )


@cache
def _chosen() -> tuple[tuple[str, ...], ...]:
    rows = list(_rows())
    return tuple(rows[i] for i in hf.pairwise(rows))


def _variant(family: str, sizes: str, tied: str, rope: str, window: str) -> hf.Variant:
    changes = {
        **SIZES[sizes],
        **hf.TIED[tied],
        **hf.ROPES[rope],
        **hf.WINDOWS[family][window],
    }
    return hf.Variant("", family, changes)


@pytest.mark.torch
@pytest.mark.slow
@pytest.mark.parametrize(
    ("family", "sizes", "tied", "rope", "window", "mesh"),
    [pytest.param(*row, id="-".join(row)) for row in _chosen()],
)
def test_logits_are_those_of_transformers(
    tmp_path: Path, family: str, sizes: str, tied: str, rope: str, window: str, mesh: str
) -> None:
    """Every pair of family, sizes, tied, rotary embedding, window and mesh occurs."""
    hf.save_reference(tmp_path, _variant(family, sizes, tied, rope, window))
    expected = hf.logits(hf.load_reference(tmp_path), TEXTS)
    model = mtd.load(tmp_path, mesh=make_mesh(parse_mesh(mesh)))
    assert np.abs(np.asarray(mtd.logits(model, TEXTS)) - expected).max() <= LOGITS


@pytest.mark.torch
@pytest.mark.slow
@pytest.mark.parametrize(
    ("family", "sizes", "mesh"),
    [
        ("llama", "all-divide", "data=2,fsdp=2,tensor=2"),
        ("mistral", "two-kv-heads", "fsdp=4,tensor=2"),
        ("qwen2", "all-divide", "data=2,tensor=4"),
        ("qwen3", "three-kv-heads", "fsdp=2,tensor=4"),
    ],
)
def test_a_mesh_writes_what_one_device_writes(
    tmp_path: Path, family: str, sizes: str, mesh: str
) -> None:
    """Every file byte for byte, also by way of a native checkpoint, as training leaves one."""
    source = tmp_path / "source"
    hf.save_reference(source, _variant(family, sizes, "untied", "default", "everything"))
    plain = load_as_stored(source)
    spread = load_as_stored(source, mesh=make_mesh(parse_mesh(mesh)))
    split = [w for w in jax.tree.leaves(spread.params) if not w.sharding.is_fully_replicated]
    assert len(split) >= 6  # embedding, head, and the four matrices of the layers

    for name, model in {"plain": plain, "spread": spread}.items():
        (tmp_path / name).mkdir()
        write_huggingface(model.params, tmp_path / name)
    save_native(spread, tmp_path / "native")
    to_huggingface(tmp_path / "native", tmp_path / "converted")
    written = {name: _files(tmp_path / name) for name in ("plain", "spread", "converted")}
    assert written["spread"] == written["plain"]
    assert written["converted"] == written["plain"]
    theirs, ours = (load_file(tmp_path / n / "model.safetensors") for n in ("source", "spread"))
    assert theirs.keys() == ours.keys()
    for tensor, values in theirs.items():
        np.testing.assert_array_equal(ours[tensor], values, err_msg=tensor)


def _files(directory: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in directory.iterdir()}


PROMPTS = [hf.prompt(length=n, seed=n)[0].tolist() for n in (3, 40, hf.PROMPT_TOKENS, 17, 100)]


@cache
def _checkpoint(directory: Path, family: str, sizes: str) -> tuple[Path, list[tuple[int, ...]]]:
    """A checkpoint and its tokens without a mesh, made once for all meshes."""
    path = directory / f"{family}-{sizes}"
    rope = {"llama": "llama3", "mistral": "yarn", "qwen2": "default", "qwen3": "dynamic"}[family]
    window = list(hf.WINDOWS[family])[-1]
    tied = "tied" if sizes == "three-kv-heads" else "untied"
    hf.save_reference(path, _variant(family, sizes, tied, rope, window))
    return path, _tokens(mtd.load(path))


def _tokens(
    model: mtd.LanguageModel, method: Method = AR, prompts: list[list[int]] | None = None
) -> list[tuple[int, ...]]:
    done = mtd.generate(
        model,
        method,
        prompts or PROMPTS,
        max_new_tokens=NEW_TOKENS,
        batch_size=len(PROMPTS),
        ignore_eos=True,
    )
    return [c.token_ids for c in done]


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("checkpoints")


def _one_of_each() -> list[Any]:
    """Every mesh once; families and kinds of sizes in turn (no two of the seven are the same)."""
    rows = zip(itertools.cycle(hf.FAMILIES), itertools.cycle(MANY_HEADS), MESHES, strict=False)
    return [pytest.param(*row, id="-".join(row)) for row in rows]


@pytest.mark.torch
@pytest.mark.slow
@pytest.mark.parametrize(
    ("family", "sizes", "mesh"), [*_one_of_each(), ("mistral", "one-kv-head", "data=2,tensor=4")]
)
def test_a_ragged_batch_gives_the_tokens_of_one_device(
    checkpoints: Path, family: str, sizes: str, mesh: str
) -> None:
    """523 tokens beside three: chunks, padding rows (the mesh divides no batch of 5), windows."""
    path, expected = _checkpoint(checkpoints, family, sizes)
    assert len(set(expected)) == len(PROMPTS)
    assert _tokens(mtd.load(path, mesh=make_mesh(parse_mesh(mesh)))) == expected


@cache
def _reference(directory: Path, family: str, sizes: str) -> tuple[Path, dict[str, np.ndarray]]:
    """A checkpoint and what transformers computes of it in each dtype."""
    path = directory / f"{family}-{sizes}-reference"
    rope = {"llama": "llama3", "mistral": "yarn", "qwen2": "default", "qwen3": "linear"}[family]
    tied = "tied" if sizes == "three-kv-heads" else "untied"
    hf.save_reference(path, _variant(family, sizes, tied, rope, list(hf.WINDOWS[family])[-1]))
    models = {dtype: hf.load_reference(path, dtype) for dtype in ("float32", "bfloat16")}
    return path, {dtype: hf.logits(model, TEXTS) for dtype, model in models.items()}


@pytest.mark.torch
@pytest.mark.slow
@pytest.mark.parametrize(("family", "sizes", "mesh"), _one_of_each())
def test_bfloat16_diverges_little(
    checkpoints: Path,
    family: str,
    sizes: str,
    mesh: str,
    record_property: Callable[[str, object], None],
) -> None:
    path, expected = _reference(checkpoints, family, sizes)
    model = mtd.load(path, dtype="bfloat16", mesh=make_mesh(parse_mesh(mesh)))
    assert model.params.embedding.dtype == "bfloat16"
    kl = hf.mean_kl(expected["bfloat16"], np.asarray(mtd.logits(model, TEXTS)))
    record_property("mean KL", kl)
    assert kl <= KL


@pytest.mark.torch
@pytest.mark.slow
@pytest.mark.parametrize(("family", "sizes", "mesh"), _one_of_each())
def test_logits_against_the_cache_are_those_of_transformers(
    checkpoints: Path, family: str, sizes: str, mesh: str
) -> None:
    """The text but its end is read as a prompt, the end token by token."""
    path, expected = _reference(checkpoints, family, sizes)
    model = mtd.load(path, mesh=make_mesh(parse_mesh(mesh)))
    lengths = np.full(len(TEXTS), TEXTS.shape[1] - NEW_TOKENS)
    with model.on_mesh():
        ours = cached_logits(model.params, TEXTS, lengths, NEW_TOKENS)
    assert np.abs(ours - expected["float32"][:, -NEW_TOKENS - 1 :]).max() <= LOGITS


@pytest.mark.torch
@pytest.mark.slow
@pytest.mark.parametrize(
    ("mesh", "method"),
    [
        ("data=2,tensor=4", mtd.methods.ngram(branches="2x1")),
        ("fsdp=4,tensor=2", mtd.methods.ngram(drafts=3)),
        ("data=8", mtd.methods.self_speculative(skip_mlp="1", drafts=3)),
        ("tensor=2", mtd.methods.prompt_lookup(drafts=3)),
    ],
    ids=lambda value: value if isinstance(value, str) else value.name,
)
def test_drafting_gives_the_tokens_of_one_device(
    checkpoints: Path, mesh: str, method: Method
) -> None:
    path, expected = _checkpoint(checkpoints, "llama", "all-divide")
    model = mtd.load(path, mesh=make_mesh(parse_mesh(mesh)))
    prompts = [[*p, *p[-6:], *p[-6:]] for p in PROMPTS]
    plain = _tokens(mtd.load(path), AR, prompts)
    assert plain != expected
    assert _tokens(model, method, prompts) == plain
