"""Hugging Face's config.json <-> `ModelConfig`.

Both spellings of rotary embedding are read and written: `rope_theta` and `rope_scaling` of
transformers 4.x, `rope_parameters` of 5.x.
"""

from __future__ import annotations

import dataclasses
import re
import sys
from collections.abc import Mapping
from typing import Any

from mtd_jax.config import ANCHORS, ROPE_KINDS, CycleConfig, ModelConfig, RopeConfig
from mtd_jax.convert.families import FAMILIES, Family
from mtd_jax.errors import InputError, unknown_name
from mtd_jax.typing import is_number, is_whole

_WINDOWED, _FULL = "sliding_attention", "full_attention"

# Keys that change the arithmetic in ways this program does not know, with the values that do not.
_REFUSED: Mapping[str, tuple[Any, ...]] = {
    "partial_rotary_factor": (None, 1, 1.0),
    "quantization_config": (None, {}),
    "pretraining_tp": (None, 0, 1),
    "attention_chunk_size": (None,),
    "attn_logit_softcapping": (None,),
    "final_logit_softcapping": (None,),
    "query_pre_attn_scalar": (None,),
    "embedding_multiplier": (None, 1, 1.0),
    "residual_multiplier": (None, 1, 1.0),
    "attention_multiplier": (None,),
    "logits_scaling": (None, 1, 1.0),
    "num_experts": (None, 0),
    "num_local_experts": (None, 0, 1),
    # Later variants of DMTD: rows that look ahead, and rows that never reach the middle layers.
    "dmtd_block_attention": (None, "none"),
    "dmtd_history_mode": (None, "real"),
}

# The keys of DMTD's authors: E, M, D and the cycle; the last one is ours.
_CYCLE_KEYS = ("num_encoding_layers", "num_thinking_layers", "num_decoding_layers", "mtp_horizon")
_ANCHOR_KEY = "mtp_anchor"
_CYCLE_PREFIX = re.compile(r"^(dmtd|mtp)[-_]?")

# Keys whose null is a value (no window, no such token, as many as query heads), not an absence.
_NULL_SAYS_SOMETHING = (
    "sliding_window",
    "num_key_value_heads",
    "bos_token_id",
    "eos_token_id",
    "pad_token_id",
)

_ROPE_NUMBERS: Mapping[str, tuple[str, ...]] = {
    "llama3": ("low_freq_factor", "high_freq_factor"),
    "yarn": ("beta_fast", "beta_slow", "attention_factor", "mscale", "mscale_all_dim"),
}


def config_from_hf(
    values: dict[str, Any], generation_config: dict[str, Any] | None = None
) -> ModelConfig:
    """The model that a config.json describes.

    Keys that a family does not use are ignored, as transformers does, except those that would
    change the result. Token ids in `generation_config` (generation_config.json) go first.

    Raises:
      InputError: an unknown family, an unsupported feature, or values that make no model.
    """
    name, family = _family_of(values)
    for key, harmless in _REFUSED.items():
        if values.get(key) not in harmless:
            raise InputError(f"config.json: {key} = {_short(values[key])} is not supported")
    merged = {
        **family.defaults,
        **{k: v for k, v in values.items() if v is not None or k in _NULL_SAYS_SOMETHING},
    }
    if merged["hidden_act"] not in ("silu", "swish"):
        raise InputError(f"config.json: hidden_act = {_short(merged['hidden_act'])}, only silu is")
    heads = _whole(merged, "num_attention_heads")
    layers = _whole(merged, "num_hidden_layers")
    hidden = _whole(merged, "hidden_size")
    bias = _flag(merged, "attention_bias")
    mlp_bias = _flag(merged, "mlp_bias") if family.mlp_bias is None else family.mlp_bias
    tokens = {**merged, **{k: v for k, v in (generation_config or {}).items() if v is not None}}
    config = ModelConfig(
        family=name,
        vocab_size=_whole(merged, "vocab_size"),
        hidden_size=hidden,
        intermediate_size=_whole(merged, "intermediate_size"),
        num_layers=layers,
        num_heads=heads,
        num_kv_heads=_whole(merged, "num_key_value_heads", heads),
        head_dim=_whole(merged, "head_dim", hidden // heads if heads > 0 else 0),
        max_position=_whole(merged, "max_position_embeddings"),
        norm_eps=_number(merged, "rms_norm_eps"),
        tie_embeddings=_flag(merged, "tie_word_embeddings"),
        qkv_bias=bias if family.qkv_bias is None else family.qkv_bias,
        attention_out_bias=bias and family.qkv_bias is None,
        mlp_bias=mlp_bias,
        qk_norm=family.qk_norm,
        sliding_windows=_sliding_windows(family, merged, layers),
        rope=_rope_from_hf(merged),
        bos_token_id=_first_token(tokens.get("bos_token_id")),
        eos_token_ids=_tokens("eos_token_id", tokens.get("eos_token_id")),
        pad_token_id=_in_vocabulary(tokens.get("pad_token_id"), merged["vocab_size"]),
        cycles=_cycles_from_hf(merged, layers),
    )
    return config


def config_to_hf(config: ModelConfig, dtype: str | None = None) -> dict[str, Any]:
    """A config.json that transformers 4.x and 5.x read back as the same model.

    With cycles, it is one for the engine of DMTD's authors: transformers has no such model.

    Raises:
      InputError: the model has features that its family cannot express there.
    """
    family = FAMILIES[config.family]
    rope = _rope_to_hf(config.rope)
    eos = list(config.eos_token_ids)
    values: dict[str, Any] = {
        "architectures": [family.architecture],
        "model_type": family.model_types[0],
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "max_position_embeddings": config.max_position,
        "rms_norm_eps": config.norm_eps,
        "tie_word_embeddings": config.tie_embeddings,
        "hidden_act": "silu",
        "rope_theta": config.rope.theta,
        "rope_scaling": rope if config.rope.kind != "default" else None,
        "rope_parameters": {"rope_theta": config.rope.theta, **rope},
        "bos_token_id": config.bos_token_id,
        "eos_token_id": eos[0] if len(eos) == 1 else eos or None,
        "pad_token_id": config.pad_token_id,
        **_windows_to_hf(family, config),
        **_cycles_to_hf(family, config),
    }
    if family.qkv_bias is None:
        values["attention_bias"] = config.qkv_bias
    if family.mlp_bias is None:
        values["mlp_bias"] = config.mlp_bias
    if dtype is not None:
        values["torch_dtype"] = values["dtype"] = dtype
    said = config
    if config.cycles is not None:
        cycles = dataclasses.replace(config.cycles, model_type=values["model_type"])
        said = dataclasses.replace(config, cycles=cycles)
    if config_from_hf(values) != said:
        raise InputError(f"a '{config.family}' config.json cannot express all of this model")
    return values


def _family_of(values: Mapping[str, Any]) -> tuple[str, Family]:
    known = {kind: name for name, family in FAMILIES.items() for kind in family.model_types}
    kind = values.get("model_type")
    if not isinstance(kind, str):
        raise InputError("config.json has no 'model_type', so this is no model's directory")
    if kind not in known and any(key in values for key in _CYCLE_KEYS):
        kind = _CYCLE_PREFIX.sub("", kind)  # dmtdqwen3 and its like
    if kind not in known:
        raise unknown_name("model family", kind[:60], known)
    return known[kind], FAMILIES[known[kind]]


def _cycles_from_hf(values: Mapping[str, Any], layers: int) -> CycleConfig | None:
    """As the authors' own loader: what is not said is no early layer, and cycles of four."""
    if not any(values.get(key) is not None for key in _CYCLE_KEYS):
        return None
    early_key, middle_key, late_key, cycle_key = _CYCLE_KEYS
    early = _whole(values, early_key, 0)
    if values.get(middle_key) is None and values.get(late_key) is None:
        raise InputError(f"config.json has cycles, but neither {middle_key} nor {late_key}")
    late = _whole(values, late_key, layers - early - _whole(values, middle_key, 0))
    middle = _whole(values, middle_key, layers - early - late)
    if early + middle + late != layers:
        raise InputError(
            f"config.json: {early} + {middle} + {late} layers in groups, but {layers} in all"
        )
    anchor = values.get(_ANCHOR_KEY)
    if anchor is not None and anchor not in ANCHORS:
        raise unknown_name(_ANCHOR_KEY, str(anchor)[:60], ANCHORS)
    return CycleConfig(
        early=early,
        late=late,
        cycle=_whole(values, cycle_key, 4),
        anchor=anchor,
        model_type=values["model_type"],
    )


def _cycles_to_hf(family: Family, config: ModelConfig) -> dict[str, Any]:
    cycles = config.cycles
    if cycles is None:
        return {}
    middle = config.num_layers - cycles.early - cycles.late
    groups = (cycles.early, middle, cycles.late, cycles.cycle)
    anchor = {} if cycles.anchor is None else {_ANCHOR_KEY: cycles.anchor}
    kind = cycles.model_type or f"dmtd{family.model_types[0]}"
    # Engines choose by the class: a plain one would be decoded without cycles.
    names = {"model_type": kind, "architectures": [f"DMTD{family.architecture}"]}
    return {**names, **dict(zip(_CYCLE_KEYS, groups, strict=True)), **anchor}


def _sliding_windows(
    family: Family, values: Mapping[str, Any], layers: int
) -> tuple[int | None, ...] | None:
    window = values.get("sliding_window")
    if family.windows == "none" or window is None or not 1 <= layers <= 2**12:
        return None
    if family.windows == "every_layer":
        return (window,) * layers
    if not _flag(values, "use_sliding_window"):
        return None
    types = values.get("layer_types")
    if types is None:
        first = _whole(values, "max_window_layers")
        types = [_WINDOWED if layer >= first else _FULL for layer in range(layers)]
    if not isinstance(types, list) or not set(map(str, types)) <= {_WINDOWED, _FULL}:
        raise InputError(f"config.json: layer_types may hold {_WINDOWED} and {_FULL} only")
    windows = tuple(window if kind == _WINDOWED else None for kind in types)
    return windows if any(windows) else None


def _windows_to_hf(family: Family, config: ModelConfig) -> dict[str, Any]:
    windows = config.sliding_windows
    if family.windows == "none":
        return {}
    if family.windows == "every_layer":
        return {"sliding_window": windows[0] if windows else None}
    if windows is None:
        return {"use_sliding_window": False}
    types = [_WINDOWED if window else _FULL for window in windows]
    first = types.index(_WINDOWED)
    return {
        "use_sliding_window": True,
        "sliding_window": windows[first],
        "max_window_layers": first,
        "layer_types": types,
    }


def _rope_from_hf(values: Mapping[str, Any]) -> RopeConfig:
    # As transformers 5 does: what stands in the dictionary goes before the top level.
    given = values.get("rope_scaling") or values.get("rope_parameters") or {}
    if not isinstance(given, dict):
        raise InputError("config.json: rope parameters must be an object")
    if set(given) & {_WINDOWED, _FULL}:
        raise InputError("config.json: rope parameters per layer type are not supported")
    if given.get("partial_rotary_factor") not in (None, 1, 1.0):
        raise InputError("config.json: partial_rotary_factor other than 1 is not supported")
    if given.get("mrope_section") is not None:
        raise InputError("config.json: multimodal rope (mrope_section) is not supported")
    kind = given.get("rope_type", given.get("type", "default"))
    if kind not in ROPE_KINDS:
        raise unknown_name("rope type", str(kind)[:60], ROPE_KINDS)
    theta = _number(values if given.get("rope_theta") is None else given, "rope_theta")
    if kind == "default":
        return RopeConfig(theta=theta)
    context = _whole(values, "max_position_embeddings")
    # modeling_rope_utils.py: dynamic scales from the context length itself, whatever else is said.
    original = context
    if kind != "dynamic":
        original = _whole(given, "original_max_position_embeddings", context)
    if given.get("factor") is not None:
        factor = _number(given, "factor")
    elif kind == "yarn" and original > 0:
        factor = context / original
    else:
        raise InputError(f"config.json: rope type '{kind}' needs a factor")
    if kind == "llama3":
        missing = [k for k in ("low_freq_factor", "high_freq_factor") if given.get(k) is None]
        if missing:
            raise InputError(f"config.json: rope type 'llama3' needs {', '.join(missing)}")
    used: dict[str, Any] = {
        key: _number(given, key)
        for key in _ROPE_NUMBERS.get(kind, ())
        # `x or default` in the reference: zero means the default there.
        if given.get(key) is not None and not (given[key] == 0 and key.startswith("beta"))
    }
    if kind == "yarn" and given.get("truncate") is not None:
        used["truncate"] = _flag(given, "truncate")
    return RopeConfig(
        kind=kind,
        theta=theta,
        factor=factor,
        original_max_position=None if kind == "linear" else original,
        **used,
    )


def _rope_to_hf(rope: RopeConfig) -> dict[str, Any]:
    values: dict[str, Any] = {"rope_type": rope.kind}
    if rope.kind == "default":
        return values
    values["factor"] = rope.factor
    if rope.kind in ("yarn", "llama3"):
        values["original_max_position_embeddings"] = rope.original_max_position
    if rope.kind == "llama3":
        values |= {"low_freq_factor": rope.low_freq_factor}
        values |= {"high_freq_factor": rope.high_freq_factor}
    if rope.kind == "yarn":
        values |= {"beta_fast": rope.beta_fast, "beta_slow": rope.beta_slow}
        values |= {"truncate": rope.truncate}
        for name in ("attention_factor", "mscale", "mscale_all_dim"):
            if getattr(rope, name) is not None:
                values[name] = getattr(rope, name)
    return values


def _whole(values: Mapping[str, Any], key: str, default: int | None = None) -> int:
    value = values.get(key)
    value = default if value is None else value
    if isinstance(value, float) and value.is_integer():
        value = int(value)  # some exporters write 32.0
    if not is_whole(value) or abs(value) >= 2**63:
        raise InputError(f"config.json: {key} must be a 64-bit whole number, got {_short(value)}")
    return value


def _number(values: Mapping[str, Any], key: str) -> float:
    value = values[key]
    # Compared, not converted: JSON's whole numbers may be too long for a float.
    if not is_number(value) or not abs(value) <= sys.float_info.max:
        raise InputError(f"config.json: {key} must be a finite number, got {_short(value)}")
    return float(value)


def _flag(values: Mapping[str, Any], key: str) -> bool:
    value = values.get(key, False)
    if not isinstance(value, bool):
        raise InputError(f"config.json: {key} must be true or false, got {_short(value)}")
    return value


def _tokens(key: str, value: Any) -> tuple[int, ...]:
    if value is None:
        return ()
    ids = value if isinstance(value, list) else [value]
    if not all(is_whole(i) for i in ids):
        raise InputError(f"config.json: {key} must be a token id or a list of them")
    return tuple(ids)


def _first_token(value: Any) -> int | None:
    return next(iter(_tokens("bos_token_id", value)), None)


def _in_vocabulary(value: Any, vocabulary: Any) -> int | None:
    # Checkpoints from before the field meant anything say -1, or the size of the vocabulary.
    ids = _tokens("pad_token_id", value)
    inside = [i for i in ids if isinstance(vocabulary, int) and 0 <= i < vocabulary]
    return inside[0] if inside else None


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
