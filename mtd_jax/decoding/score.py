"""Logits of whole texts."""

from __future__ import annotations

import jax
import numpy as np

from mtd_jax.decoding.language_model import LanguageModel
from mtd_jax.errors import InputError
from mtd_jax.transformer.model import forward
from mtd_jax.typing import Array, Float

_forward = jax.jit(forward)


def logits(model: LanguageModel, token_ids: object) -> Float[Array, "B T V"]:
    """Float32 logits of a plain causal pass of the base model over [B, T] token ids.

    Compiles once for every shape; pad texts behind their end to share one.

    Raises:
      InputError: ids that are not a [B, T] array of whole numbers within the vocabulary, or longer
        than the context.
    """
    try:
        ids = np.asarray(token_ids)
    except ValueError:
        raise InputError("token_ids must be rows of equal length") from None
    if ids.ndim != 2 or ids.size == 0 or not np.issubdtype(ids.dtype, np.integer):
        raise InputError(f"token_ids must be [B, T] whole numbers, got {ids.dtype} {ids.shape}")
    vocab = model.config.vocab_size
    if ids.min() < 0 or ids.max() >= vocab:
        raise InputError(f"token ids must be in 0..{vocab - 1}")
    if ids.shape[1] > model.config.context_length:
        raise InputError(
            f"{ids.shape[1]} tokens are more than the context of {model.config.context_length}"
        )
    with model.on_mesh():
        return _forward(model.params, ids.astype(np.int32))
