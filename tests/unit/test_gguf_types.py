"""Every type that the gguf library knows: dequantised as it does it, or refused by name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import jax
import numpy as np
import pytest
from gguf import GGMLQuantizationType as Kind

from mtd_jax.convert.load import load_as_stored
from mtd_jax.errors import InputError
from mtd_jax.sharding import make_mesh
from tests.support.checkpoints import hf_config, hf_shapes, hf_tensors, write_hf
from tests.support.gguf_files import write_gguf

# Every row is a multiple of the longest block, 256; llama.cpp reorders rows of this architecture.
CONFIG = hf_config(
    "llama", hidden_size=256, intermediate_size=512, head_dim=64, num_hidden_layers=2
)


def dequantisable(kind: Kind) -> bool:
    """Asked of the library itself, so that a type that it learns is tested from then on."""
    try:
        gguf.quants.dequantize(np.zeros((1, gguf.GGML_QUANT_SIZES[kind][1]), np.uint8), kind)
    except NotImplementedError:
        return False
    return True


KNOWN = [kind for kind in Kind if dequantisable(kind)]
OTHERS = [kind for kind in Kind if kind not in KNOWN]


def random_blocks(kind: Kind, shape: tuple[int, ...], rng: np.random.Generator) -> np.ndarray:
    """Random bytes, without the blocks whose scale makes them infinite, NaN or huge."""
    width, size = gguf.GGML_QUANT_SIZES[kind]
    if width == 1:  # plain floats
        values = rng.normal(0, 0.2, shape).astype(np.float32)
        return gguf.quants.quantize(values, kind).view(np.uint8)
    pool = rng.integers(0, 256, (4096, size), dtype=np.uint8)
    with np.errstate(all="ignore"):
        largest = np.abs(gguf.quants.dequantize(pool, kind)).max(-1)
    pool = pool[(largest < 100) & (largest > 0)]  # NaN fails both
    assert len(pool) > 400
    blocks = pool[rng.integers(0, len(pool), int(np.prod(shape)) // width)]
    return blocks.reshape(*shape[:-1], -1)


def test_the_lists_are_those_of_the_issue() -> None:
    names = {kind.name for kind in KNOWN}
    assert names >= {"F32", "F16", "BF16", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0"}
    assert names >= {"Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "TQ1_0", "TQ2_0", "MXFP4"}
    assert names >= {"IQ1_S", "IQ1_M", "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ3_XXS", "IQ3_S", "IQ4_NL"}
    assert {kind.name for kind in OTHERS} >= {"I8", "Q8_1", "F64"}


@pytest.mark.parametrize("kind", KNOWN, ids=lambda kind: kind.name)
def test_matrices_are_what_the_library_makes_of_them(tmp_path: Path, kind: Kind) -> None:
    rng = np.random.default_rng(0)
    tensors = hf_tensors(CONFIG)
    matrices = {n: random_blocks(kind, s, rng) for n, s in hf_shapes(CONFIG).items() if len(s) > 1}
    floats = {name: gguf.quants.dequantize(raw, kind) for name, raw in matrices.items()}
    assert all(values.shape == tensors[name].shape for name, values in floats.items())
    path = write_gguf(tmp_path / "m.gguf", CONFIG, tensors | matrices, quantized=kind.name)

    model = load_as_stored(path, dtype="float32")
    blocks: Any = model.params.blocks
    for layer in range(2):
        down = floats[f"model.layers.{layer}.mlp.down_proj.weight"]
        np.testing.assert_array_equal(blocks.down[layer], down.T)
    np.testing.assert_array_equal(model.params.embedding, floats["model.embed_tokens.weight"])
    # Where each of the others goes is what Hugging Face checkpoints are tested for.
    reference = load_as_stored(write_hf(tmp_path / "hf", CONFIG, tensors | floats))
    split = load_as_stored(path, dtype="float32", mesh=make_mesh({"tensor": 2, "fsdp": 4}))
    for ours, theirs, spread in zip(
        *(jax.tree.leaves(m.params) for m in (model, reference, split)), strict=True
    ):
        np.testing.assert_array_equal(ours, theirs)
        np.testing.assert_array_equal(spread, theirs)


@pytest.mark.parametrize("kind", OTHERS, ids=lambda kind: kind.name)
def test_types_that_the_library_cannot_dequantise_are_named(tmp_path: Path, kind: Kind) -> None:
    width, size = gguf.GGML_QUANT_SIZES[kind]
    plain = {"I8": np.int8, "I16": np.int16, "I32": np.int32, "I64": np.int64, "F64": np.float64}
    tensors = hf_tensors(CONFIG)
    for name, shape in hf_shapes(CONFIG).items():
        if kind.name in plain and len(shape) > 1:
            tensors[name] = np.zeros(shape, plain[kind.name])
        elif len(shape) > 1:
            tensors[name] = np.zeros((*shape[:-1], shape[-1] // width * size), np.uint8)
    path = write_gguf(tmp_path / "m.gguf", CONFIG, tensors, quantized=kind.name)
    with pytest.raises(InputError, match=rf"'blk\.0.*' is stored as {kind.name}, ") as caught:
        load_as_stored(path)
    assert "\n" not in str(caught.value)


def test_blocks_that_are_not_finite_are_refused_without_a_warning(tmp_path: Path) -> None:
    tensors: dict[str, Any] = dict(hf_tensors(CONFIG))
    name = "model.layers.1.mlp.down_proj.weight"
    tensors[name] = np.full((256, 512 // 256 * 144), 0xFF, np.uint8)  # scale: NaN
    for other, shape in hf_shapes(CONFIG).items():
        if len(shape) > 1 and other != name:
            tensors[other] = np.zeros((*shape[:-1], shape[-1] // 256 * 144), np.uint8)
    path = write_gguf(tmp_path / "m.gguf", CONFIG, tensors, quantized="Q4_K")
    with pytest.raises(InputError, match=r"'blk\.1\.ffn_down\.weight' holds NaN"):
        load_as_stored(path)
