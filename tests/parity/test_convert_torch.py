"""Conversion against transformers itself: its checkpoints give its logits, and it loads ours."""

from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

from mtd_jax.convert.conversions import to_huggingface, to_native
from mtd_jax.convert.huggingface import read_config
from mtd_jax.convert.load import load
from mtd_jax.transformer.model import forward
from tests.support.checkpoints import BASE, FAMILIES

pytestmark = pytest.mark.torch

LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
VARIANTS: list[tuple[str, dict[str, Any]]] = [(family, {}) for family in FAMILIES] + [
    ("llama", {"tie_word_embeddings": True, "num_key_value_heads": 1}),
    ("llama", {"attention_bias": True, "mlp_bias": True}),
    ("llama", {"rope_scaling": {"rope_type": "linear", "factor": 4.0}}),
    ("llama", {"rope_scaling": {"rope_type": "dynamic", "factor": 4.0}}),
    ("llama", {"rope_scaling": LLAMA3, "rope_theta": 500_000.0}),
    ("llama", {"rope_parameters": LLAMA3 | {"rope_theta": 500_000.0}}),
    ("qwen2", {"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}),
    (
        "qwen2",
        {"rope_scaling": {"rope_type": "yarn", "original_max_position_embeddings": 64}}
        | {"max_position_embeddings": 256},
    ),
    ("qwen2", {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1}),
    (
        "qwen3",
        {
            "use_sliding_window": True,
            "sliding_window": 6,
            "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
        },
    ),
    ("qwen3", {"attention_bias": True, "head_dim": 8}),
    ("mistral", {"sliding_window": None}),
]


def save_reference(directory: Path, family: str, changes: dict[str, Any]) -> Any:
    import torch
    from transformers import CONFIG_MAPPING, AutoModelForCausalLM

    values = {**BASE, **FAMILIES[family], **changes}
    if "factor" not in values.get("rope_scaling", {"factor": 1}):
        values["rope_scaling"] = values["rope_scaling"] | {"factor": None}
    config = CONFIG_MAPPING[values.pop("model_type")](**values)
    config._attn_implementation = "eager"
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval()
    for name, weight in model.named_parameters():
        torch.nn.init.normal_(weight, 1.0 if "norm" in name else 0.0, 0.2)
    model.save_pretrained(directory)
    return model


def logits_of(reference: Any, tokens: np.ndarray) -> np.ndarray:
    import torch

    with torch.no_grad():
        return reference(torch.from_numpy(tokens)).logits.numpy()


@pytest.mark.parametrize(("family", "changes"), VARIANTS)
def test_logits_are_those_of_transformers(
    tmp_path: Path, family: str, changes: dict[str, Any]
) -> None:
    from transformers import AutoModelForCausalLM

    reference = save_reference(tmp_path / "reference", family, changes)
    tokens = np.random.default_rng(1).integers(3, 99, (2, 70))
    expected = logits_of(reference, tokens)
    to_native(tmp_path / "reference", tmp_path / "native")
    model = load(tmp_path / "native")
    ours = np.asarray(forward(model.params, jnp.asarray(tokens, jnp.int32)))
    np.testing.assert_allclose(ours, expected, atol=1e-4, rtol=1e-4)

    to_huggingface(tmp_path / "native", tmp_path / "back")
    again, report = AutoModelForCausalLM.from_pretrained(
        tmp_path / "back", attn_implementation="eager", output_loading_info=True
    )
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    np.testing.assert_allclose(logits_of(again.eval(), tokens), expected, atol=1e-6, rtol=1e-6)
    assert read_config(tmp_path / "back") == model.config


def test_defaults_are_those_of_the_configuration_classes() -> None:
    from transformers import CONFIG_MAPPING

    from mtd_jax.convert.hf_config import config_from_hf

    for family in FAMILIES:
        absent = config_from_hf({"model_type": family})
        theirs = config_from_hf(CONFIG_MAPPING[family]().to_dict())
        assert absent == theirs, family
