"""GGUF: the same model as its Hugging Face checkpoint, and nothing believed in a broken file."""

import contextlib
import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from mtd_jax.config import RopeConfig
from mtd_jax.convert.conversions import to_huggingface, to_native
from mtd_jax.convert.gguf import open_gguf, read_config
from mtd_jax.convert.load import load, load_as_stored
from mtd_jax.convert.summary import summarize
from mtd_jax.errors import InputError
from mtd_jax.sharding import make_mesh
from mtd_jax.transformer.rope import inverse_frequencies
from tests.support.checkpoints import hf_config, hf_tensors, write_hf
from tests.support.gguf_files import write_gguf
from tests.support.tokenizers import TEXT, byte_level

LARGE = {"hidden_size": 256, "intermediate_size": 512, "head_dim": 64}


def tokenizer_keys(pre: str = "gpt-2") -> dict[str, Any]:
    """What llama.cpp's converter writes of a byte-level tokenizer."""
    tokenizer = byte_level()
    spec = json.loads(tokenizer._backend.to_str())
    vocabulary = sorted(spec["model"]["vocab"], key=spec["model"]["vocab"].get)
    special = {token["content"] for token in spec["added_tokens"]}
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": pre,
        "tokenizer.ggml.tokens": vocabulary,
        "tokenizer.ggml.token_type": [3 if t in special else 1 for t in vocabulary],
        "tokenizer.ggml.merges": [" ".join(merge) for merge in spec["model"]["merges"]],
        "tokenizer.chat_template": str(tokenizer._inner.chat_template),
    }


@pytest.mark.parametrize(
    ("arch", "changes"),
    [
        ("llama", {}),
        ("llama", {"tie_word_embeddings": True}),
        ("llama", {"num_key_value_heads": 4}),
        ("qwen2", {}),
        ("qwen3", {}),
    ],
)
def test_is_the_model_of_the_hugging_face_checkpoint(
    tmp_path: Path, arch: str, changes: dict[str, Any]
) -> None:
    config = hf_config(arch, **changes)
    tensors = hf_tensors(config)
    reference = load_as_stored(write_hf(tmp_path / "hf", config, tensors))
    model = load_as_stored(write_gguf(tmp_path / "m.gguf", config, tensors, arch=arch))
    assert model.config == reference.config
    assert model.fingerprint == reference.fingerprint
    for ours, theirs in zip(
        jax.tree.leaves(model.params), jax.tree.leaves(reference.params), strict=True
    ):
        np.testing.assert_array_equal(ours, theirs)


@pytest.mark.parametrize("kind", ["F16", "BF16", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0"])
def test_quantised_weights_are_the_librarys(tmp_path: Path, kind: str) -> None:
    import gguf

    config = hf_config("qwen2", **LARGE)
    tensors = hf_tensors(config)
    path = write_gguf(tmp_path / "m.gguf", config, tensors, arch="qwen2", quantized=kind)
    model = load_as_stored(path, dtype="float32")
    assert ("dequantised" in model.source) == kind.startswith("Q")
    quant = gguf.GGMLQuantizationType[kind]
    down = tensors["model.layers.1.mlp.down_proj.weight"]
    expected = gguf.quants.dequantize(gguf.quants.quantize(down, quant), quant)
    blocks: Any = model.params.blocks
    np.testing.assert_array_equal(blocks.down[1], expected.T)
    split = load_as_stored(path, dtype="float32", mesh=make_mesh({"tensor": 2, "fsdp": 4}))
    for one, other in zip(
        jax.tree.leaves(model.params), jax.tree.leaves(split.params), strict=True
    ):
        np.testing.assert_array_equal(one, other)


def test_float16_stays_if_nothing_is_quantised(tmp_path: Path) -> None:
    config = hf_config("qwen2")
    path = write_gguf(
        tmp_path / "m.gguf", config, hf_tensors(config), arch="qwen2", quantized="F16"
    )
    assert str(load_as_stored(path).params.embedding.dtype) == "float16"
    assert str(load_as_stored(path, dtype="float32").params.embedding.dtype) == "float32"


def test_matrices_of_several_types_lose_nothing(tmp_path: Path) -> None:
    config = hf_config("qwen2")
    tensors = hf_tensors(config)
    up = tensors["model.layers.1.mlp.up_proj.weight"]
    up /= 3
    halves = {n: x.astype(np.float16) for n, x in tensors.items() if "layers.1." not in n}
    path = write_gguf(tmp_path / "m.gguf", config, tensors | halves, arch="qwen2")
    params: Any = load_as_stored(path).params
    assert str(params.embedding.dtype) == "float32"
    np.testing.assert_array_equal(params.blocks.gate_up[1][:, 1], up.T)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("attention.sliding_window", 8),
        ("attention.sliding_window", "8"),
        ("attn_logit_softcapping", 50.0),
        ("final_logit_softcapping", 30.0),
        ("logit_scale", 0.5),
        ("rope.scale_linear", 4.0),
        ("rope.scaling.attn_factor", 1.2),
        ("rope.scaling.yarn_log_multiplier", 0.1),
    ],
)
def test_what_would_change_the_arithmetic_is_refused(
    tmp_path: Path, key: str, value: float | str
) -> None:
    config = hf_config()
    extra = {f"llama.{key}": value}
    path = write_gguf(tmp_path / "m.gguf", config, hf_tensors(config), extra=extra)
    with pytest.raises(InputError, match=r"not supported"):
        read_config(open_gguf(path))


def test_a_window_as_long_as_the_context_changes_nothing(tmp_path: Path) -> None:
    config = hf_config()
    extra = {"llama.attention.sliding_window": config["max_position_embeddings"]}
    path = write_gguf(tmp_path / "m.gguf", config, hf_tensors(config), extra=extra)
    assert read_config(open_gguf(path)).sliding_windows is None


def test_llama3_frequencies_are_recognised(tmp_path: Path) -> None:
    rope = RopeConfig(kind="llama3", theta=500_000.0, factor=32.0, original_max_position=8192)
    plain = RopeConfig(theta=500_000.0)
    factors = inverse_frequencies(plain, 64) / inverse_frequencies(rope, 64)
    config = hf_config("llama", **LARGE, rope_theta=500_000.0)
    tensors = hf_tensors(config)
    path = write_gguf(
        tmp_path / "m.gguf", config, tensors, extra_tensors={"rope_freqs.weight": factors}
    )
    assert load(path).config.rope == rope
    odd = factors.copy()
    odd[10] = 5
    path = write_gguf(
        tmp_path / "odd.gguf", config, tensors, extra_tensors={"rope_freqs.weight": odd}
    )
    with pytest.raises(InputError, match="rope_freqs"):
        load(path)


@pytest.mark.parametrize(
    ("extra", "expected"),
    [
        ({"llama.rope.scaling.type": "none"}, RopeConfig()),
        (
            {"llama.rope.scaling.type": "linear", "llama.rope.scaling.factor": 4.0},
            RopeConfig(kind="linear", factor=4.0),
        ),
        (
            {
                "llama.rope.scaling.type": "yarn",
                "llama.rope.scaling.factor": 4.0,
                "llama.rope.scaling.original_context_length": 64,
            },
            RopeConfig(kind="yarn", factor=4.0, original_max_position=64),
        ),
        (
            {
                "llama.rope.scaling.type": "yarn",
                "llama.rope.scaling.factor": 4.0,
                "llama.rope.scaling.yarn_beta_fast": 16.0,
                "llama.rope.scaling.yarn_beta_slow": 2.0,
            },
            RopeConfig(
                kind="yarn", factor=4.0, original_max_position=256, beta_fast=16.0, beta_slow=2.0
            ),
        ),
    ],
)
def test_rope_scaling(tmp_path: Path, extra: dict[str, Any], expected: RopeConfig) -> None:
    config = hf_config()
    path = write_gguf(tmp_path / "m.gguf", config, hf_tensors(config), extra=extra)
    assert read_config(open_gguf(path)).rope == expected


def test_tokenizer_from_metadata_and_its_way_to_disk(tmp_path: Path) -> None:
    tokenizer = byte_level()
    config = hf_config(vocab_size=tokenizer.vocab_size)
    path = write_gguf(tmp_path / "m.gguf", config, hf_tensors(config), extra=tokenizer_keys())
    to_native(path, tmp_path / "native")
    to_huggingface(path, tmp_path / "hf")
    messages = [{"role": "user", "content": "the 你"}]
    for place in (path, tmp_path / "native", tmp_path / "hf"):
        ours = load(place).tokenizer
        assert ours is not None
        assert ours.vocab_size == tokenizer.vocab_size
        assert ours.eos_token_ids == (2,)
        assert ours.chat(messages) == tokenizer.chat(messages)
        for text in TEXT:
            assert ours.encode(text) == tokenizer.encode(text)
            assert ours.decode(ours.encode(text)) == text
    assert summarize(path)["tokenizer"]


@pytest.mark.parametrize(("pre", "digits"), [("smollm", 5), ("qwen2", 5), ("llama-bpe", 2)])
def test_pre_tokenizers_split_digits_their_way(tmp_path: Path, pre: str, digits: int) -> None:
    keys = tokenizer_keys(pre)
    merged = ["1 2", "12 3", "123 4", "1234 5", "4 5"]
    keys["tokenizer.ggml.tokens"] += ["12", "123", "1234", "12345", "45"]
    keys["tokenizer.ggml.merges"] += merged
    keys["tokenizer.ggml.token_type"] += [1] * 5
    vocabulary = len(keys["tokenizer.ggml.tokens"])
    config = hf_config(vocab_size=vocabulary)
    path = write_gguf(tmp_path / "m.gguf", config, hf_tensors(config), extra=keys)
    tokenizer = load(path).tokenizer
    assert tokenizer is not None
    ids = tokenizer.encode("12345")
    assert len(ids) - (pre == "llama-bpe") == digits
    assert (ids[0] == 1) == (pre == "llama-bpe")  # begins with <s>


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tokenizer.ggml.pre": "smolm"}, "unknown GGUF pre-tokenizer 'smolm'.*'smollm'"),
        ({"tokenizer.ggml.merges": ["a b c"]}, "not two tokens"),
        ({"tokenizer.ggml.merges": ["zz yy"]}, "inconsistent"),
        ({"tokenizer.ggml.tokens": [1, 2, 3]}, "list of texts"),
        ({"tokenizer.ggml.token_type": 3}, "no list"),
    ],
)
def test_tokenizers_that_are_not_known_are_refused(
    tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    config = hf_config()
    path = write_gguf(
        tmp_path / "m.gguf", config, hf_tensors(config), extra=tokenizer_keys() | changes
    )
    with pytest.raises(InputError, match=message):
        load(path)


def test_a_vocabulary_of_another_kind_loads_without_tokenizer(tmp_path: Path) -> None:
    config = hf_config()
    keys = tokenizer_keys() | {"tokenizer.ggml.model": "t5"}
    path = write_gguf(tmp_path / "m.gguf", config, hf_tensors(config), extra=keys)
    assert load(path).tokenizer is None


@pytest.mark.parametrize("arch", ["gemma3", "lama", "bert"])
def test_unknown_architectures_are_refused(tmp_path: Path, arch: str) -> None:
    config = hf_config()
    path = write_gguf(tmp_path / "m.gguf", config, hf_tensors(config), arch=arch)
    with pytest.raises(InputError, match=f"unknown GGUF architecture '{arch}'"):
        load(path)


def overwrite(at: int, data: bytes) -> Callable[[bytes], bytes]:
    return lambda content: content[:at] + data + content[at + len(data) :]


@pytest.mark.parametrize(
    "damage",
    [
        lambda content: b"",
        lambda content: content[:3],
        lambda content: content[:20],
        lambda content: content[:200],
        lambda content: content[:1500],
        lambda content: content[:-1000],
        overwrite(0, b"FUGG"),
        overwrite(4, struct.pack("<I", 99)),
        overwrite(4, struct.pack(">I", 3)),
        overwrite(8, struct.pack("<Q", 2**60)),
        overwrite(16, struct.pack("<Q", 2**60)),
        overwrite(24, struct.pack("<Q", 2**63)),
    ],
)
def test_damaged_files_are_refused(tmp_path: Path, damage: Callable[[bytes], bytes]) -> None:
    config = hf_config()
    path = write_gguf(tmp_path / "m.gguf", config, hf_tensors(config))
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(InputError) as caught:
        load(path)
    assert "\n" not in str(caught.value)
    assert "m.gguf" in str(caught.value)


def test_random_damage_never_gives_another_error(tmp_path: Path) -> None:
    config = hf_config(num_hidden_layers=1)
    path = write_gguf(tmp_path / "m.gguf", config, hf_tensors(config))
    content = path.read_bytes()
    rng = np.random.default_rng(0)
    for _ in range(300):
        at, width = int(rng.integers(0, 2500)), int(rng.choice([1, 4, 8]))
        path.write_bytes(overwrite(at, rng.bytes(width))(content))
        with contextlib.suppress(InputError):
            read_config(open_gguf(path))
