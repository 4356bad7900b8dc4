"""Decoding on one device and on eight against transformers with its cache: every step's logits.

Prompts of more than 500 tokens and of different lengths are read into one cache, and the tokens
behind them follow one at a time, by parameters as `load` lays them out for decoding. transformers
has its cache too: where the rotary embedding is dynamic, keys stay turned as they were for the
text that there was when they were written.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

import mtd_jax as mtd
from mtd_jax.sharding import make_mesh, parse_mesh
from tests.support import hf
from tests.support.cached import cached_logits
from tests.support.meshes import MESHES

pytestmark = [pytest.mark.torch, pytest.mark.slow]

LOGITS = 1e-4
KL = 0.015
STEPS = 16
LENGTHS = np.array([505, hf.PROMPT_TOKENS])
TEXTS = hf.prompt(rows=2, length=hf.PROMPT_TOKENS + STEPS)

# Every window of every family, every rotary embedding twice or more.
CHOSEN = (
    "llama-mha-untied-default-everything",
    "llama-gqa-tied-dynamic-everything",
    "llama-mqa-tied-llama3-everything",
    "mistral-gqa-tied-yarn-everything",
    "mistral-mqa-tied-dynamic-window",
    "mistral-mha-untied-linear-window",
    "qwen2-mqa-untied-llama3-everything",
    "qwen2-gqa-tied-default-window",
    "qwen2-mha-untied-yarn-window-from-1",
    "qwen3-gqa-untied-dynamic-everything",
    "qwen3-mqa-tied-llama3-window",
    "qwen3-mha-untied-linear-window-by-layer",
)
OF_EACH_FAMILY = (CHOSEN[1], CHOSEN[5], CHOSEN[8], CHOSEN[11])
# A mesh for each, in turn: of 12 and 7 every mesh comes.
ON = dict(zip(CHOSEN, itertools.cycle(MESHES), strict=False))
VARIANTS = {v.id: v for v in hf.product()}


def _both(directory: Path, variant: str, dtype: str) -> tuple[np.ndarray, np.ndarray]:
    """The logits of transformers and ours."""
    hf.save_reference(directory, VARIANTS[variant])
    theirs = hf.load_reference(directory, dtype)
    model = mtd.load(directory, dtype=dtype)
    assert isinstance(model.params.blocks, tuple)  # laid out for decoding on CPU
    assert model.params.head is not None
    assert model.params.embedding.dtype == dtype
    expected = hf.logits_with_cache(theirs, TEXTS, LENGTHS, STEPS)
    return expected, cached_logits(model.params, TEXTS, LENGTHS, STEPS)


@pytest.mark.parametrize("variant", CHOSEN)
def test_logits_of_every_step_are_those_of_transformers(tmp_path: Path, variant: str) -> None:
    expected, ours = _both(tmp_path, variant, "float32")
    assert expected.shape == (2, 1 + STEPS, hf.VOCAB)
    assert expected.std() > 0.5  # so that 1e-4 is small
    assert np.abs(ours - expected).max() <= LOGITS
    model = mtd.load(tmp_path, mesh=make_mesh(parse_mesh(ON[variant])))
    with model.on_mesh():  # a row for every device
        spread = cached_logits(model.params, np.tile(TEXTS, (4, 1)), np.tile(LENGTHS, 4), STEPS)
    assert np.abs(spread - np.tile(expected, (4, 1, 1))).max() <= LOGITS


@pytest.mark.parametrize("variant", OF_EACH_FAMILY)
def test_bfloat16_diverges_little(
    tmp_path: Path, variant: str, record_property: Callable[[str, object], None]
) -> None:
    kl = hf.mean_kl(*_both(tmp_path, variant, "bfloat16"))
    record_property("mean KL", kl)
    assert kl <= KL
