"""Hugging Face directories: what is read, and that it comes back bit for bit."""

import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from mtd_jax.convert.conversions import to_huggingface, to_native
from mtd_jax.convert.fingerprint import fingerprint
from mtd_jax.convert.huggingface import read_config, read_parameters
from mtd_jax.convert.load import load, load_as_stored
from mtd_jax.convert.safetensors_files import open_safetensors
from mtd_jax.errors import InputError
from mtd_jax.sharding import make_mesh
from mtd_jax.transformer.model import forward
from tests.support.checkpoints import FAMILIES, hf_config, hf_tensors, write_hf

VARIANTS: list[tuple[str, dict[str, Any]]] = [(family, {}) for family in FAMILIES] + [
    ("llama", {"tie_word_embeddings": True}),
    ("llama", {"attention_bias": True, "mlp_bias": True}),
    ("llama", {"num_key_value_heads": 4}),
    ("llama", {"num_key_value_heads": 1}),
    ("qwen3", {"attention_bias": True}),
]


def read(directory: Path, **options: Any) -> Any:
    return read_parameters(read_config(directory), open_safetensors(directory), **options)


def tensors_in(directory: Path) -> dict[str, np.ndarray]:
    files = sorted(directory.glob("*.safetensors"))
    return {name: value for file in files for name, value in load_file(file).items()}


def test_fused_leaves_hold_the_right_rows(tmp_path: Path) -> None:
    config = hf_config()
    tensors = hf_tensors(config)
    params = read(write_hf(tmp_path, config, tensors))
    at = "model.layers.1.self_attn."
    q = tensors[f"{at}q_proj.weight"]
    qkv = params.blocks.qkv[1]
    assert qkv.shape == (32, 2, 4, 8)
    # Query head 3 is the second of key head 1; G = 2.
    np.testing.assert_array_equal(qkv[:, 1, 1], q[3 * 8 : 4 * 8].T)
    np.testing.assert_array_equal(qkv[:, 1, 2], tensors[f"{at}k_proj.weight"][8:].T)
    np.testing.assert_array_equal(qkv[:, 0, 3], tensors[f"{at}v_proj.weight"][:8].T)
    o = tensors[f"{at}o_proj.weight"]
    np.testing.assert_array_equal(params.blocks.attention_out[1, 1], o[:, 16:].T)
    up = tensors["model.layers.1.mlp.up_proj.weight"]
    np.testing.assert_array_equal(params.blocks.gate_up[1, :, 1], up.T)
    np.testing.assert_array_equal(params.head, tensors["lm_head.weight"].T)


@pytest.mark.parametrize(("family", "changes"), VARIANTS)
@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16, np.float16])
def test_there_and_back_bit_for_bit(
    tmp_path: Path, family: str, changes: dict[str, Any], dtype: Any
) -> None:
    config = hf_config(family, **changes)
    tensors = hf_tensors(config, dtype=dtype)
    source = write_hf(tmp_path / "source", config, tensors, shards=3)
    to_native(source, tmp_path / "native")
    to_huggingface(tmp_path / "native", tmp_path / "back", shard_size=20_000)
    back = tensors_in(tmp_path / "back")
    assert back.keys() == tensors.keys()
    for name, values in tensors.items():
        assert back[name].dtype == values.dtype
        np.testing.assert_array_equal(back[name].view(np.uint8), values.view(np.uint8))
    assert read_config(tmp_path / "back") == read_config(source)
    index = json.loads((tmp_path / "back" / "model.safetensors.index.json").read_text())
    assert set(index["weight_map"]) == set(tensors)
    assert index["metadata"]["total_size"] == sum(v.nbytes for v in tensors.values())


def test_one_shard_has_the_usual_name(tmp_path: Path) -> None:
    to_huggingface(write_hf(tmp_path / "a"), tmp_path / "b")
    assert (tmp_path / "b" / "model.safetensors").is_file()
    assert not list((tmp_path / "b").glob("*.index.json"))


@pytest.mark.parametrize(
    "sizes", [{"tensor": 2}, {"fsdp": 2, "tensor": 2}, {"data": 2, "fsdp": 4}, {"tensor": 8}]
)
def test_a_mesh_changes_no_value(tmp_path: Path, sizes: dict[str, int]) -> None:
    config = hf_config("qwen2", tie_word_embeddings=False)
    directory = write_hf(tmp_path, config, shards=2)
    whole = read(directory)
    mesh = make_mesh(sizes)
    split = read(directory, mesh=mesh)
    assert split.blocks.down.sharding.mesh.shape == mesh.shape
    for one, other in zip(jax.tree.leaves(whole), jax.tree.leaves(split), strict=True):
        np.testing.assert_array_equal(one, other)
    assert fingerprint(whole) == fingerprint(split)


def test_each_device_reads_only_its_part(tmp_path: Path) -> None:
    directory = write_hf(tmp_path)
    files = open_safetensors(directory)
    read_sizes: dict[str, list[int]] = {}
    original = files.read

    def counted(name: str, index: tuple[slice, ...]) -> np.ndarray:
        values = original(name, index)
        read_sizes.setdefault(name, []).append(values.size)
        return values

    files.read = counted  # type: ignore[method-assign]
    read_parameters(read_config(directory), files, mesh=make_mesh({"tensor": 2, "fsdp": 2}))
    for name, sizes in read_sizes.items():
        total = int(np.prod(files.shape(name)))
        assert sum(sizes) <= total, f"{name}: {sizes} of {total}"


def test_dtype_is_kept_or_converted(tmp_path: Path) -> None:
    config = hf_config()
    directory = write_hf(tmp_path, config, hf_tensors(config, dtype=ml_dtypes.bfloat16))
    assert load_as_stored(directory).params.embedding.dtype == jnp.bfloat16
    assert load_as_stored(directory, dtype="float32").params.embedding.dtype == jnp.float32
    assert load(directory).params.embedding.dtype == jnp.float32  # on CPU
    assert load(directory, dtype="bfloat16").params.embedding.dtype == jnp.bfloat16


@pytest.mark.parametrize("name", ["model.norm.weight", "model.layers.1.mlp.up_proj.weight"])
def test_mixed_types_become_float32(tmp_path: Path, name: str) -> None:
    """So that no bit of any of them is lost, on the way back either."""
    config = hf_config()
    tensors = hf_tensors(config, dtype=ml_dtypes.bfloat16)
    tensors[name] = hf_tensors(config)[name] / 3
    directory = write_hf(tmp_path / "hf", config, tensors)
    params = load_as_stored(directory).params
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {np.dtype(np.float32)}
    to_native(directory, tmp_path / "native")
    to_huggingface(tmp_path / "native", tmp_path / "back")
    for key, values in tensors_in(tmp_path / "back").items():
        np.testing.assert_array_equal(values, tensors[key].astype(np.float32))


def test_fingerprint_follows_values_not_formats(tmp_path: Path) -> None:
    config = hf_config()
    tensors = hf_tensors(config)
    directory = write_hf(tmp_path / "a", config, tensors, shards=2)
    first = load(directory).fingerprint
    to_native(directory, tmp_path / "native", dtype="bfloat16")
    assert load(tmp_path / "native").fingerprint == first
    assert load_as_stored(directory, dtype="bfloat16").fingerprint == first
    tensors["model.layers.2.mlp.down_proj.weight"][3, 5] += 1.0
    assert load(write_hf(tmp_path / "b", config, tensors)).fingerprint != first
    changed = hf_config(rope_theta=20_000.0)
    assert load(write_hf(tmp_path / "c", changed, hf_tensors(config))).fingerprint != first
    renamed = hf_config(eos_token_id=[2, 3])
    assert load(write_hf(tmp_path / "d", renamed, hf_tensors(config))).fingerprint == first


def test_harmless_extras_are_ignored(tmp_path: Path) -> None:
    config = hf_config(tie_word_embeddings=True)
    tensors = hf_tensors(config)
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].copy()
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = np.ones(4, np.float32)
    assert load_as_stored(write_hf(tmp_path, config, tensors)).params.head is None


def test_all_problems_are_named_together(tmp_path: Path) -> None:
    config = hf_config()
    tensors = hf_tensors(config)
    del tensors["model.layers.1.mlp.up_proj.weight"]
    tensors["model.layers.9.odd"] = np.ones(3, np.float32)
    tensors["model.norm.weight"] = np.ones(31, np.float32)
    directory = write_hf(tmp_path, config, tensors)
    twice = ["model.layers.0.mlp.up_proj.weight", "model.layers.2.mlp.up_proj.weight"]
    save_file({name: tensors[name] for name in twice}, directory / "model-again.safetensors")
    (directory / "model.safetensors").rename(directory / "model-once.safetensors")
    with pytest.raises(InputError) as caught:
        load(directory)
    message = str(caught.value)
    for name in twice:
        assert f"'{name}' is in both model-again.safetensors and model-once.safetensors" in message
    assert "missing tensors: 'model.layers.1.mlp.up_proj.weight'" in message
    assert "'model.layers.9.odd'" in message
    assert "'model.norm.weight' is [31], not [32]" in message
    assert "\n" not in message


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16, np.float16])
def test_nan_and_infinity_are_refused_by_name(tmp_path: Path, bad: float, dtype: Any) -> None:
    config = hf_config()
    tensors = hf_tensors(config, dtype=dtype)
    tensors["model.layers.2.self_attn.o_proj.weight"][7, 9] = bad
    with pytest.raises(InputError, match=r"layers\.2\.self_attn\.o_proj\.weight' holds NaN"):
        load(write_hf(tmp_path, config, tensors))


def test_extreme_finite_values_are_kept(tmp_path: Path) -> None:
    config = hf_config()
    tensors = hf_tensors(config, dtype=np.float16)
    tensors["model.norm.weight"][:3] = [65504, -65504, 6e-8]
    assert float(load(write_hf(tmp_path, config, tensors)).params.final_norm[0]) == 65504


@pytest.mark.parametrize(("value", "dtype"), [(1e5, "float16"), (3.4e38, "bfloat16")])
def test_values_that_a_smaller_type_cannot_hold(tmp_path: Path, value: float, dtype: str) -> None:
    config = hf_config()
    tensors = hf_tensors(config)
    tensors["model.layers.1.mlp.up_proj.weight"][3, 4] = value
    directory = write_hf(tmp_path, config, tensors)
    with pytest.raises(InputError, match=rf"up_proj\.weight' as {dtype} holds NaN or infinite"):
        load(directory, dtype=dtype)


def test_a_head_that_is_not_the_embedding_is_refused(tmp_path: Path) -> None:
    config = hf_config(tie_word_embeddings=True)
    tensors = hf_tensors(config)
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"] + np.float32(1)
    with pytest.raises(InputError, match="tied"):
        load(write_hf(tmp_path, config, tensors))


def test_forward_runs_on_what_was_read(tmp_path: Path) -> None:
    params = load(write_hf(tmp_path)).params
    logits = forward(params, jnp.asarray([[1, 5, 7, 2]], jnp.int32))
    assert logits.shape == (1, 4, 99)
    assert bool(jnp.isfinite(logits).all())
