"""The real GGUF file against transformers' own reading of it."""

from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

from mtd_jax.convert.gguf import open_gguf, read_config, read_parameters, read_tokenizer
from mtd_jax.convert.hf_config import config_from_hf
from mtd_jax.transformer.model import forward
from tests.support.real import gguf_file

pytestmark = pytest.mark.optimized

CODE = Path(__file__).resolve().parents[2]


@pytest.mark.slow
@pytest.mark.torch
def test_weights_config_and_logits() -> None:
    import torch
    from transformers import AutoModelForCausalLM

    path = gguf_file()
    reference = AutoModelForCausalLM.from_pretrained(
        path.parent, gguf_file=path.name, dtype=torch.float32, attn_implementation="eager"
    ).eval()
    file = open_gguf(path)
    params = read_parameters(file)
    values = reference.config.to_dict()
    values.pop("quantization_config", None)
    config, theirs = read_config(file), config_from_hf(values)
    for field in ("hidden_size", "num_layers", "num_kv_heads", "head_dim", "rope", "max_position"):
        assert getattr(config, field) == getattr(theirs, field), field
    assert config.norm_eps == pytest.approx(theirs.norm_eps, rel=1e-6)

    weights = {name: value.numpy() for name, value in reference.state_dict().items()}
    np.testing.assert_array_equal(params.embedding, weights["model.embed_tokens.weight"])
    at = "model.layers.17."
    blocks: Any = params.blocks
    np.testing.assert_array_equal(blocks.down[17], weights[f"{at}mlp.down_proj.weight"].T)
    q = weights[f"{at}self_attn.q_proj.weight"].reshape(3, 3, 64, 576)
    np.testing.assert_array_equal(blocks.qkv[17, :, :, :3], q.transpose(3, 0, 1, 2))

    tokens = np.random.default_rng(0).integers(3, 49152, (1, 600))
    with torch.no_grad():
        expected = reference(torch.from_numpy(tokens)).logits.numpy()
    ours = np.asarray(forward(params, jnp.asarray(tokens, jnp.int32)))
    # float32 sums of 30 layers in another order; logits are of order 10.
    np.testing.assert_allclose(ours, expected, atol=3e-3)
    assert (ours.argmax(-1) == expected.argmax(-1)).mean() > 0.99


def test_tokenizer_round_trips_this_projects_source() -> None:
    tokenizer = read_tokenizer(open_gguf(gguf_file()))
    assert tokenizer is not None
    for file in sorted((CODE / "mtd_jax").rglob("*.py"))[:20]:
        text = file.read_text(encoding="utf-8")
        assert tokenizer.decode(tokenizer.encode(text)) == text
