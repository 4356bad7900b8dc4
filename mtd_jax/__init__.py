"""Multi-token decoding of large language models in JAX.

    import mtd_jax as mtd

    model = mtd.load("models/smollm2")
    method = mtd.methods.autoregressive()
    for chunk in mtd.generate(model, method, "Why is the sky blue?", stream=True):
        print(chunk.text, end="")

Underneath are pure functions: `transformer.model.forward`, `Method.prefill`, `Method.step`.
"""

from __future__ import annotations

from mtd_jax import methods
from mtd_jax.convert.heads import load_heads
from mtd_jax.convert.load import load
from mtd_jax.decoding.generate import Chunk, Completion, generate
from mtd_jax.decoding.language_model import LanguageModel
from mtd_jax.decoding.requests import Prompt
from mtd_jax.decoding.sampling import Sampling
from mtd_jax.decoding.score import logits
from mtd_jax.errors import InputError
from mtd_jax.evaluation.step_cost import calibrated
from mtd_jax.transformer.model import forward

__version__ = "0.1.0"

__all__ = [
    "Chunk",
    "Completion",
    "InputError",
    "LanguageModel",
    "Prompt",
    "Sampling",
    "calibrated",
    "forward",
    "generate",
    "load",
    "load_heads",
    "logits",
    "methods",
]
