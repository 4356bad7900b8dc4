"""config.json in both spellings, defaults, and what is refused."""

from typing import Any

import pytest

from mtd_jax.config import RopeConfig
from mtd_jax.convert.assemble import leaf_paths, plan
from mtd_jax.convert.families import FAMILIES, HF_TENSORS, gguf_tensors
from mtd_jax.convert.hf_config import config_from_hf, config_to_hf
from mtd_jax.errors import InputError
from mtd_jax.parameters import Weight
from mtd_jax.transformer.model import declare
from tests.support.checkpoints import hf_config

LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({"rope_theta": 5e5}, RopeConfig(theta=5e5)),
        ({"rope_theta": 5e5, "rope_scaling": None}, RopeConfig(theta=5e5)),
        ({"rope_theta": 1.0, "rope_parameters": {"rope_theta": 5e5}}, RopeConfig(theta=5e5)),
        (
            {"rope_scaling": {"type": "linear", "factor": 2.0}},
            RopeConfig(kind="linear", factor=2.0),
        ),
        (
            {"rope_parameters": {"rope_type": "linear", "factor": 2, "rope_theta": 7.0}},
            RopeConfig(kind="linear", factor=2, theta=7.0),
        ),
        (
            {"rope_scaling": LLAMA3},
            RopeConfig(kind="llama3", factor=8.0, original_max_position=256),
        ),
        (
            {"rope_scaling": LLAMA3 | {"original_max_position_embeddings": 64}},
            RopeConfig(kind="llama3", factor=8.0, original_max_position=64),
        ),
        (
            {"rope_scaling": {"type": "dynamic", "factor": 4.0}},
            RopeConfig(kind="dynamic", factor=4.0, original_max_position=256),
        ),
        (
            {"rope_scaling": {"type": "yarn", "original_max_position_embeddings": 64}},
            RopeConfig(kind="yarn", factor=4.0, original_max_position=64),
        ),
        (
            {"rope_scaling": {"type": "yarn", "factor": 2.0, "beta_fast": 0, "mscale": 0.7}},
            RopeConfig(kind="yarn", factor=2.0, original_max_position=256, mscale=0.7),
        ),
    ],
)
def test_rope_in_both_spellings(given: dict[str, Any], expected: RopeConfig) -> None:
    values = hf_config()
    del values["rope_theta"]
    config = config_from_hf({**values, **given})
    assert config.rope == expected
    assert config_from_hf(config_to_hf(config)) == config
    new_only = {k: v for k, v in config_to_hf(config).items() if k != "rope_scaling"}
    assert config_from_hf({k: v for k, v in new_only.items() if k != "rope_theta"}) == config
    old_only = {k: v for k, v in config_to_hf(config).items() if k != "rope_parameters"}
    assert config_from_hf(old_only) == config


@pytest.mark.parametrize("family", FAMILIES)
def test_defaults_make_a_model_and_come_back(family: str) -> None:
    config = config_from_hf({"model_type": family})
    assert config.family == family
    assert config_from_hf(config_to_hf(config)) == config


def test_features_of_the_families() -> None:
    assert config_from_hf(hf_config("qwen2")).qkv_bias
    assert not config_from_hf(hf_config("qwen2")).attention_out_bias
    assert config_from_hf(hf_config("qwen3")).qk_norm
    biased = config_from_hf(hf_config("llama", attention_bias=True))
    assert biased.qkv_bias
    assert biased.attention_out_bias
    assert config_from_hf(hf_config("llama", mlp_bias=True)).mlp_bias
    assert config_from_hf(hf_config("mistral")).sliding_windows == (5, 5, 5)
    assert config_from_hf(hf_config("mistral", sliding_window=None)).sliding_windows is None
    assert config_from_hf(hf_config("llama", sliding_window=7)).sliding_windows is None


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({}, None),
        ({"sliding_window": 4}, None),
        ({"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 3}, None),
        ({"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1}, (None, 4, 4)),
        ({"use_sliding_window": True, "sliding_window": None}, None),
        (
            {
                "use_sliding_window": True,
                "sliding_window": 4,
                "layer_types": ["sliding_attention", "full_attention", "full_attention"],
            },
            (4, None, None),
        ),
    ],
)
@pytest.mark.parametrize("family", ["qwen2", "qwen3"])
def test_windows_of_qwen(family: str, given: dict[str, Any], expected: Any) -> None:
    config = config_from_hf(hf_config(family, **given))
    assert config.sliding_windows == expected
    assert config_from_hf(config_to_hf(config)) == config


def test_special_tokens() -> None:
    assert config_from_hf(hf_config(eos_token_id=[2, 5])).eos_token_ids == (2, 5)
    generation = {"eos_token_id": [7], "pad_token_id": 3, "bos_token_id": None}
    config = config_from_hf(hf_config(eos_token_id=2), generation)
    assert (config.bos_token_id, config.eos_token_ids, config.pad_token_id) == (1, (7,), 3)
    assert config_from_hf(hf_config(pad_token_id=-1)).pad_token_id is None
    assert config_from_hf(hf_config(eos_token_id=None)).eos_token_ids == ()


def test_null_and_absence_differ() -> None:
    assert config_from_hf(hf_config("llama", num_key_value_heads=None)).num_kv_heads == 4
    assert config_from_hf(hf_config("llama", head_dim=None)).head_dim == 8
    assert config_from_hf(hf_config("llama", num_key_value_heads=2.0)).num_kv_heads == 2


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "qwen4"}, r"unknown model family 'qwen4' \(did you mean 'qwen[23]'\?\)"),
        ({"model_type": None}, "no 'model_type'"),
        ({"hidden_act": "gelu"}, "hidden_act"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
        ({"quantization_config": {"bits": 4}}, "quantization_config"),
        ({"pretraining_tp": 2}, "pretraining_tp"),
        ({"rope_scaling": {"rope_type": "longrope", "factor": 2}}, "unknown rope type 'longrope'"),
        ({"rope_scaling": {"rope_type": "linear"}}, "needs a factor"),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 2.0}}, "low_freq_factor"),
        ({"rope_scaling": {"rope_type": "linear", "factor": "2"}}, "finite number"),
        ({"rope_scaling": {"rope_type": "linear", "factor": 0}}, "factor"),
        ({"rope_scaling": [1]}, "must be an object"),
        ({"rope_scaling": {"rope_type": ["x"]}}, "unknown rope type"),
        ({"rope_theta": "x"}, "theta"),
        ({"rope_scaling": {"rope_type": "yarn"}, "max_position_embeddings": "x"}, "whole number"),
        ({"num_attention_heads": 0}, "num_heads"),
        ({"num_attention_heads": -4}, "num_heads"),
        ({"num_hidden_layers": 10**9}, "num_layers"),
        ({"num_hidden_layers": "3"}, "num_hidden_layers"),
        ({"num_hidden_layers": True}, "num_hidden_layers"),
        ({"num_key_value_heads": 3}, "multiple"),
        ({"hidden_size": 10**12}, "hidden_size"),
        ({"hidden_size": 1.5}, "hidden_size"),
        ({"vocab_size": 0}, "vocab_size"),
        ({"head_dim": 7}, "even"),
        ({"rms_norm_eps": "small"}, "norm_eps"),
        ({"rms_norm_eps": float("nan")}, "norm_eps"),
        ({"eos_token_id": 1000}, "outside"),
        ({"eos_token_id": "</s>"}, "eos_token_id"),
        ({"eos_token_id": [2, "x"]}, "eos_token_id"),
        ({"pad_token_id": "x"}, "pad_token_id"),
    ],
)
def test_what_cannot_be_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message) as caught:
        config_from_hf(hf_config(**changes))
    assert "\n" not in str(caught.value)


def test_windows_that_make_no_sense_are_refused() -> None:
    windowed = {"use_sliding_window": True, "sliding_window": 4}
    for types in (["odd"] * 3, ["full_attention", "sliding_attention"], "sliding_attention"):
        with pytest.raises(InputError, match=r"layer_types|sliding_windows"):
            config_from_hf(hf_config("qwen3", **windowed, layer_types=types))


def test_what_a_family_cannot_say_is_refused() -> None:
    config = config_from_hf(hf_config("qwen2"))
    with pytest.raises(InputError, match="qwen2"):
        config_to_hf(type(config).from_dict(config.to_dict() | {"final_logit_softcap": 3.0}))


@pytest.mark.parametrize("family", FAMILIES)
def test_every_weight_is_filled_exactly_once(family: str) -> None:
    """Each leaf of the model is covered by its tensors, without gap or overlap."""
    config = config_from_hf(hf_config(family))
    tables = [HF_TENSORS, gguf_tensors(FAMILIES[family])]
    for leaves in (plan(config, table) for table in tables):
        for path, weight in leaf_paths(declare(config)):
            assert isinstance(weight, Weight)
            pieces = leaves[path]
            shape = weight.shape[1:] if path.startswith("blocks.") else weight.shape
            axis = pieces[0].axis
            assert [p.start for p in pieces] == [
                sum(q.layout.leaf_shape[axis] for q in pieces[:i]) for i in range(len(pieces))
            ]
            assert sum(p.layout.leaf_shape[axis] for p in pieces) == shape[axis]
