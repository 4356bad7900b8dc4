"""The model families: one entry each, from which configs and tensor tables are read and written.

A family is a row of `FAMILIES`: the names Hugging Face uses, the values its configuration class
assumes where a key is absent, and which optional parts its layers have. The tensor tables below are
shared: a tensor is used if the model declares the weight it fills.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, Literal

Windows = Literal["none", "every_layer", "by_layer"]


@dataclasses.dataclass(frozen=True)
class TensorRule:
    """Where one tensor of a file goes.

    Several tensors that fill one leaf are laid side by side, in table order, along the axis on
    which they are narrower than the leaf.
    """

    key: str
    """The tensor's name; `{}` stands for the layer."""
    leaf: str
    """Path in `transformer.model.Parameters`."""
    pattern: str
    """Axes in the file -> axes in the leaf (without L), in the letters of `typing.py`; parentheses
    join axes, outermost first."""


@dataclasses.dataclass(frozen=True)
class Family:
    """What sets one family apart from the others."""

    architecture: str
    """The class that Hugging Face's config.json names under `architectures`."""
    model_types: tuple[str, ...]
    """Values of `model_type` that mean this family; the first one is written."""
    defaults: Mapping[str, Any]
    """What the family's configuration class in transformers assumes for absent keys."""
    qkv_bias: bool | None = False
    """None: the config's `attention_bias` decides, for the output projection too."""
    mlp_bias: bool | None = False
    """None: the config's `mlp_bias` decides."""
    qk_norm: bool = False
    windows: Windows = "none"
    """`every_layer`: `sliding_window` holds in all of them. `by_layer`: `use_sliding_window`
    switches it on, `layer_types` or else `max_window_layers` says where."""
    gguf: str | None = None
    """`general.architecture` of GGUF files."""
    gguf_rotates_pairs: bool = False
    """llama.cpp turns neighbouring rows of this architecture's q and k: its files permute them."""


_COMMON = {
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "hidden_size": 4096,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10_000.0,
    "hidden_act": "silu",
    "tie_word_embeddings": False,
}
_QWEN = _COMMON | {
    "vocab_size": 151_936,
    "intermediate_size": 22_016,
    "num_key_value_heads": 32,
    "max_position_embeddings": 32_768,
    "sliding_window": 4096,
    "max_window_layers": 28,
}

FAMILIES: Mapping[str, Family] = MappingProxyType(
    {
        "llama": Family(
            architecture="LlamaForCausalLM",
            model_types=("llama",),
            defaults=_COMMON
            | {
                "vocab_size": 32_000,
                "intermediate_size": 11_008,
                "max_position_embeddings": 2048,
                "bos_token_id": 1,
                "eos_token_id": 2,
            },
            qkv_bias=None,
            mlp_bias=None,
            gguf="llama",
            gguf_rotates_pairs=True,
        ),
        "mistral": Family(
            architecture="MistralForCausalLM",
            model_types=("mistral",),
            defaults=_COMMON
            | {
                "vocab_size": 32_000,
                "intermediate_size": 14_336,
                "num_key_value_heads": 8,
                "max_position_embeddings": 131_072,
                "sliding_window": 4096,
                "bos_token_id": 1,
                "eos_token_id": 2,
            },
            windows="every_layer",
        ),
        "qwen2": Family(
            architecture="Qwen2ForCausalLM",
            model_types=("qwen2",),
            defaults=_QWEN,
            qkv_bias=True,
            windows="by_layer",
            gguf="qwen2",
        ),
        "qwen3": Family(
            architecture="Qwen3ForCausalLM",
            model_types=("qwen3",),
            defaults=_QWEN | {"head_dim": 128},
            qkv_bias=None,
            qk_norm=True,
            windows="by_layer",
            gguf="qwen3",
        ),
    }
)

_HF_LAYER = (
    ("input_layernorm.weight", "attention_norm", "D -> D"),
    ("self_attn.q_proj.weight", "qkv", "(K G H) D -> D K G H"),
    ("self_attn.k_proj.weight", "qkv", "(K H) D -> D K 1 H"),
    ("self_attn.v_proj.weight", "qkv", "(K H) D -> D K 1 H"),
    ("self_attn.q_proj.bias", "qkv_bias", "(K G H) -> K G H"),
    ("self_attn.k_proj.bias", "qkv_bias", "(K H) -> K 1 H"),
    ("self_attn.v_proj.bias", "qkv_bias", "(K H) -> K 1 H"),
    ("self_attn.q_norm.weight", "q_norm", "H -> H"),
    ("self_attn.k_norm.weight", "k_norm", "H -> H"),
    ("self_attn.o_proj.weight", "attention_out", "D (K G H) -> K (G H) D"),
    ("self_attn.o_proj.bias", "attention_out_bias", "D -> D"),
    ("post_attention_layernorm.weight", "mlp_norm", "D -> D"),
    ("mlp.gate_proj.weight", "gate_up", "F D -> D 1 F"),
    ("mlp.up_proj.weight", "gate_up", "F D -> D 1 F"),
    ("mlp.gate_proj.bias", "gate_up_bias", "F -> 1 F"),
    ("mlp.up_proj.bias", "gate_up_bias", "F -> 1 F"),
    ("mlp.down_proj.weight", "down", "D F -> F D"),
    ("mlp.down_proj.bias", "down_bias", "D -> D"),
)

HF_TENSORS: tuple[TensorRule, ...] = (
    TensorRule("model.embed_tokens.weight", "embedding", "V D -> V D"),
    *(TensorRule(f"model.layers.{{}}.{key}", f"blocks.{leaf}", p) for key, leaf, p in _HF_LAYER),
    TensorRule("model.norm.weight", "final_norm", "D -> D"),
    TensorRule("lm_head.weight", "head", "V D -> D V"),
)

_GGUF_NAMES = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
_GGUF_TOP = {
    "model.embed_tokens.weight": "token_embd.weight",
    "model.norm.weight": "output_norm.weight",
    "lm_head.weight": "output.weight",
}


def gguf_tensors(family: Family) -> tuple[TensorRule, ...]:
    """The table for GGUF files: other names and, where llama.cpp rotates neighbours, other rows.

    Its row order within a head is (H/2, 2) where ours is (2, H/2) (R = H/2 in the patterns).
    """
    return tuple(_gguf_rule(rule, family.gguf_rotates_pairs) for rule in HF_TENSORS)


def _gguf_rule(rule: TensorRule, rotates_pairs: bool) -> TensorRule:
    if rule.key in _GGUF_TOP:
        return dataclasses.replace(rule, key=_GGUF_TOP[rule.key])
    name, kind = rule.key.removeprefix("model.layers.{}.").rsplit(".", 1)
    pattern = rule.pattern
    if rotates_pairs and name.endswith(("q_proj", "k_proj")):
        file_axes, leaf_axes = pattern.split(" -> ")
        pattern = f"{file_axes.replace('H)', 'R 2)')} -> {leaf_axes.replace('H', '(2 R)')}"
    return TensorRule(f"blk.{{}}.{_GGUF_NAMES[name]}.{kind}", rule.leaf, pattern)
