"""Tiny Hugging Face checkpoints with random weights, written without this package's help."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

BASE: dict[str, Any] = {
    "vocab_size": 99,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10_000.0,
    "tie_word_embeddings": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
}

FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {"model_type": "llama"},
    "mistral": {"model_type": "mistral", "sliding_window": 5},
    "qwen2": {"model_type": "qwen2"},
    "qwen3": {"model_type": "qwen3", "head_dim": 16},
}


def hf_config(family: str = "llama", **changes: Any) -> dict[str, Any]:
    """A config.json."""
    return {**BASE, **FAMILIES[family], **changes}


def hf_shapes(config: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """Names and shapes as the model classes of transformers have them."""
    width, ffn, head = config["hidden_size"], config["intermediate_size"], config["head_dim"]
    q, kv = config["num_attention_heads"] * head, config["num_key_value_heads"] * head
    kind, bias = config["model_type"], config.get("attention_bias", False)
    shapes: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (config["vocab_size"], width),
        "model.norm.weight": (width,),
    }
    if not config["tie_word_embeddings"]:
        shapes["lm_head.weight"] = (config["vocab_size"], width)
    for layer in range(config["num_hidden_layers"]):
        at = f"model.layers.{layer}."
        for name in ("input_layernorm", "post_attention_layernorm"):
            shapes[f"{at}{name}.weight"] = (width,)
        for name, (out, into) in {
            "self_attn.q_proj": (q, width),
            "self_attn.k_proj": (kv, width),
            "self_attn.v_proj": (kv, width),
            "self_attn.o_proj": (width, q),
            "mlp.gate_proj": (ffn, width),
            "mlp.up_proj": (ffn, width),
            "mlp.down_proj": (width, ffn),
        }.items():
            shapes[f"{at}{name}.weight"] = (out, into)
            is_qkv = name.endswith(("q_proj", "k_proj", "v_proj"))
            if (
                (name.startswith("mlp") and config.get("mlp_bias"))
                or (is_qkv and (bias or kind == "qwen2"))
                or (name.endswith("o_proj") and bias and kind != "qwen2")
            ):
                shapes[f"{at}{name}.bias"] = (out,)
        if kind == "qwen3":
            shapes[f"{at}self_attn.q_norm.weight"] = (head,)
            shapes[f"{at}self_attn.k_norm.weight"] = (head,)
    return shapes


def hf_tensors(
    config: Mapping[str, Any], seed: int = 0, dtype: Any = np.float32
) -> dict[str, np.ndarray]:
    """Random weights, large enough that logits differ by far more than rounding."""
    rng = np.random.default_rng(seed)
    return {
        name: rng.normal(1.0 if "norm" in name else 0.0, 0.2, shape).astype(dtype)
        for name, shape in hf_shapes(config).items()
    }


def write_hf(
    directory: Path,
    config: Mapping[str, Any] | None = None,
    tensors: Mapping[str, np.ndarray] | None = None,
    *,
    shards: int = 1,
) -> Path:
    """Writes a checkpoint directory with the safetensors library."""
    config = hf_config() if config is None else config
    tensors = hf_tensors(config) if tensors is None else tensors
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.json").write_text(json.dumps(config))
    if shards == 1:
        save_file(dict(tensors), directory / "model.safetensors")
        return directory
    names = sorted(tensors)
    weight_map = {
        name: f"model-{i % shards + 1:05d}-of-{shards:05d}.safetensors"
        for i, name in enumerate(names)
    }
    for file in set(weight_map.values()):
        save_file({n: tensors[n] for n in names if weight_map[n] == file}, directory / file)
    index = {"metadata": {}, "weight_map": weight_map}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    return directory
