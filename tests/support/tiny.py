"""Tiny random models for tests."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from mtd_jax import parameters
from mtd_jax.config import ModelConfig
from mtd_jax.decoding.language_model import LanguageModel
from mtd_jax.transformer import model

CONFIG = ModelConfig(
    family="llama",
    vocab_size=97,
    hidden_size=32,
    intermediate_size=48,
    num_layers=3,
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    max_position=512,
    eos_token_ids=(2,),
    bos_token_id=1,
)


def config(**changes: Any) -> ModelConfig:
    return dataclasses.replace(CONFIG, **changes)


def params(cfg: ModelConfig = CONFIG, seed: int = 0, scale: float = 8.0) -> model.Parameters:
    """Random weights, scaled up so that logits differ by far more than rounding."""
    values = parameters.initialize(model.declare(cfg), jax.random.key(seed))
    return jax.tree.map(lambda w: w * jnp.asarray(scale if w.ndim > 2 else 1.0, w.dtype), values)


def language_model(cfg: ModelConfig = CONFIG, seed: int = 0) -> LanguageModel:
    return LanguageModel(
        params=params(cfg, seed), tokenizer=None, mesh=None, fingerprint="tiny", source="random"
    )


def decided(model: LanguageModel, factor: float = 20.0) -> LanguageModel:
    """The same with logits so many times as far apart: as they are, all tokens are nearly alike."""
    changed = model.params.replace(final_norm=model.params.final_norm * factor)
    return dataclasses.replace(model, params=changed)
