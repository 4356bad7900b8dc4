"""Every kind of model against transformers: same logits, same tokens, and back again.

Every prompt has 523 tokens, so positions, windows and stretched rotary embeddings count, and the
engine reads it in nine chunks of 64 rows. Logits are compared on one device and on eight, each kind
of model on one of the meshes in turn. The product of family x heads x tied x rotary embedding x
window is run whole in `make test`; the fast tests, and those in bfloat16, have a part of it that
holds every pair of values.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

import mtd_jax as mtd
from mtd_jax.convert.assemble import stored_form
from mtd_jax.convert.huggingface import write_huggingface
from mtd_jax.convert.load import load_as_stored
from mtd_jax.sharding import make_mesh, parse_mesh
from tests.support import hf
from tests.support.meshes import MESHES

pytestmark = pytest.mark.torch

LOGITS = 1e-4
"""The largest difference of any logit in float32."""
KL = 0.015
"""The largest mean divergence in bfloat16, nats."""
NEW_TOKENS = 8

AR = mtd.methods.autoregressive()


@cache
def _representative() -> tuple[hf.Variant, ...]:
    product = hf.product()
    names = [tuple(v.id.split("-", 4)) for v in product]
    return tuple(product[i] for i in hf.pairwise(names))


def _params(few: Sequence[hf.Variant], others: Sequence[hf.Variant] = ()) -> list[Any]:
    # `load` lays weights out for decoding; as they are stored, layers are one scan that compiles
    # faster. One of each family is compiled as for a user.
    whole = {v.family: v for v in few}.values()
    quick = [
        pytest.param(v, mtd.load, id=v.id, marks=[pytest.mark.optimized] if v in whole else [])
        for v in few
    ]
    slow = [
        pytest.param(v, load_as_stored, id=v.id, marks=pytest.mark.slow)
        for v in others
        if v not in few
    ]
    return quick + slow


def _decoded() -> list[hf.Variant]:
    """One of each family, and what the product leaves out; others are in test_cached.py."""
    families = {v.family: v for v in _representative()}
    return [*families.values(), *(v for v in hf.EXTRAS if "bias" in v.id or "dynamic" in v.id)]


@cache
def _meshes() -> dict[str, str]:
    """One for each variant; those with biases where biases are split, which two key heads are by 2.

    Their number shares no factor with the sizes of the product, so all values meet all meshes.
    """
    halves = itertools.cycle([mesh for mesh in MESHES if mesh.endswith("tensor=2")])
    meshes = itertools.cycle(MESHES)
    return {
        v.id: next(halves if v in hf.EXTRAS and "bias" in v.id else meshes)
        for v in (*hf.product(), *hf.EXTRAS)
    }


def _logits_on_mesh(
    source: Path, variant: hf.Variant, tokens: np.ndarray, dtype: str = "float32"
) -> np.ndarray:
    """Of a row for every device, all of them the same: [8, 523, V]."""
    mesh = make_mesh(parse_mesh(_meshes()[variant.id]))
    model = mtd.load(source, dtype=dtype, mesh=mesh)
    assert model.params.embedding.dtype == dtype
    return np.asarray(mtd.logits(model, np.repeat(tokens, 8, axis=0)))


def _tensors(directory: Path) -> dict[str, np.ndarray]:
    return load_file(directory / "model.safetensors")


@pytest.mark.parametrize(
    ("variant", "load"), _params((*_representative(), *hf.EXTRAS), hf.product())
)
def test_logits_are_those_of_transformers_in_both_directions(
    tmp_path: Path,
    variant: hf.Variant,
    load: Callable[..., mtd.LanguageModel],
    record_property: Callable[[str, object], None],
) -> None:
    source, written = tmp_path / "source", tmp_path / "written"
    hf.save_reference(source, variant)
    tokens = hf.prompt()
    expected = hf.logits(hf.load_reference(source), tokens)
    assert expected.std() > 0.5  # so that 1e-4 is small

    model = load(source)
    difference = float(np.abs(np.asarray(mtd.logits(model, tokens)) - expected).max())
    record_property("largest difference of logits", difference)  # in the file of --junit-xml
    assert difference <= LOGITS
    assert np.abs(_logits_on_mesh(source, variant, tokens) - expected).max() <= LOGITS

    written.mkdir()
    write_huggingface(stored_form(model.params), written)
    again = hf.load_reference(written)
    assert again.config.architectures == [f"{variant.family.capitalize()}ForCausalLM"]
    # Same code, same weights: the config must say the same for the logits to be the same bits.
    np.testing.assert_array_equal(hf.logits(again, tokens), expected)
    before, after = _tensors(source), _tensors(written)
    assert before.keys() == after.keys()
    for name, values in before.items():
        np.testing.assert_array_equal(after[name], values, err_msg=name)


@pytest.mark.slow
@pytest.mark.parametrize("variant", [pytest.param(v, id=v.id) for v in _decoded()])
def test_decoding_against_the_cache_gives_the_tokens_of_transformers(
    tmp_path: Path, variant: hf.Variant
) -> None:
    hf.save_reference(tmp_path, variant)
    prompt = hf.prompt()[0].tolist()
    expected, scores = hf.greedy(hf.load_reference(tmp_path), prompt, NEW_TOKENS)
    model = mtd.load(tmp_path)
    done = mtd.generate(model, AR, [prompt], max_new_tokens=NEW_TOKENS, ignore_eos=True)[0]
    parting = hf.first_mismatch(done.token_ids, expected, scores)
    assert parting is None or parting[1] < LOGITS, (done.token_ids, expected, parting)


@pytest.mark.slow
@pytest.mark.parametrize(("variant", "load"), _params((*_representative(), *hf.EXTRAS)))
def test_bfloat16_diverges_little(
    tmp_path: Path,
    variant: hf.Variant,
    load: Callable[..., mtd.LanguageModel],
    record_property: Callable[[str, object], None],
) -> None:
    hf.save_reference(tmp_path, variant)
    tokens = hf.prompt()
    reference = hf.load_reference(tmp_path, "bfloat16")
    assert reference.model.rotary_emb.inv_freq.dtype.itemsize == 4  # as where it is used
    expected = hf.logits(reference, tokens)
    model = load(tmp_path, dtype="bfloat16")
    assert model.params.embedding.dtype == "bfloat16"
    kl = hf.mean_kl(expected, np.asarray(mtd.logits(model, tokens)))
    record_property("mean KL", kl)
    assert kl <= KL
    spread = _logits_on_mesh(tmp_path, variant, tokens, "bfloat16")
    assert hf.mean_kl(np.repeat(expected, 8, axis=0), spread) <= KL


def test_the_variants_differ_by_far_more_than_the_tolerance(tmp_path: Path) -> None:
    """What is compared at 1e-4 above would show if a setting were ignored on either side."""
    tokens = hf.prompt()

    def spread(variants: list[hf.Variant], changes: dict[str, Any]) -> float:
        """The least difference between any two of the variants, all with the same weights."""
        found = []
        for number, variant in enumerate(variants):
            directory = tmp_path / f"{variant.family}-{len(changes)}-{number}"
            hf.save_reference(
                directory, hf.Variant("", variant.family, {**variant.changes, **changes})
            )
            found.append(hf.logits(hf.load_reference(directory), tokens))
        return min(float(np.abs(a - b).max()) for i, a in enumerate(found) for b in found[:i])

    ropes = [hf.Variant(name, "llama", rope) for name, rope in hf.ROPES.items()]
    ropes += [
        v
        for v in hf.EXTRAS
        if v.id.startswith(("yarn", "llama3", "llama-theta")) and v.family == "llama"
    ]
    assert spread(ropes, {}) > 100 * LOGITS
    for family, windows in hf.WINDOWS.items():
        if len(windows) > 1:
            assert (
                spread([hf.Variant(name, family, w) for name, w in windows.items()], {})
                > 100 * LOGITS
            )


def test_configs_say_what_the_variants_ask_for(tmp_path: Path) -> None:
    """A spelling that transformers does not know would make two variants one."""
    for variant in hf.EXTRAS:
        directory = tmp_path / variant.id
        hf.save_reference(directory, variant)
        values = json.loads((directory / "config.json").read_text())
        wanted = dict(variant.changes)
        rope = {**wanted.pop("rope_parameters", {})}
        rope |= {k: wanted.pop(k) for k in ("rope_theta",) if k in wanted}
        assert {k: values["rope_parameters"].get(k) for k in rope} == rope
        assert {k: values[k] for k in wanted if wanted[k] is not None} == {
            k: v for k, v in wanted.items() if v is not None
        }
