"""Tiny random models made, run and saved by transformers: what the parity tests compare with.

torch is imported where it is used only, so these helpers can be imported without it.
"""

from __future__ import annotations

import dataclasses
import inspect
import itertools
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

VOCAB = 128
LAYERS = 3
PROMPT_TOKENS = 523
"""More than 500 and than one chunk of `decoding.prompt`, and no multiple of anything."""
TRAINED = 256
"""What the stretched kinds of rotary embedding were trained on: half the prompt lies beyond it."""

BASE: Mapping[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 1024,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
# Stated here, because each configuration class assumes something else.
FAMILIES: Mapping[str, Mapping[str, Any]] = {
    "llama": {},
    "mistral": {"sliding_window": None},
    "qwen2": {"head_dim": 16},
    "qwen3": {"head_dim": 24},
}
HEADS: Mapping[str, Mapping[str, Any]] = {
    "mha": {"num_key_value_heads": 4},
    "gqa": {"num_key_value_heads": 2},
    "mqa": {"num_key_value_heads": 1},
}
TIED: Mapping[str, Mapping[str, Any]] = {
    "untied": {"tie_word_embeddings": False},
    "tied": {"tie_word_embeddings": True},
}
ROPES: Mapping[str, Mapping[str, Any]] = {
    "default": {"rope_parameters": {"rope_type": "default", "rope_theta": 10_000.0}},
    "linear": {
        "max_position_embeddings": TRAINED,
        "rope_parameters": {"rope_type": "linear", "rope_theta": 10_000.0, "factor": 4.0},
    },
    "dynamic": {
        "max_position_embeddings": TRAINED,
        "rope_parameters": {"rope_type": "dynamic", "rope_theta": 10_000.0, "factor": 4.0},
    },
    "yarn": {
        "rope_parameters": {
            "rope_type": "yarn",
            "rope_theta": 10_000.0,
            "factor": 4.0,
            "original_max_position_embeddings": TRAINED,
        }
    },
    "llama3": {
        "rope_parameters": {
            "rope_type": "llama3",
            "rope_theta": 500_000.0,
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": TRAINED,
        }
    },
}
_WINDOW = 100
_SLIDING, _FULL = "sliding_attention", "full_attention"
WINDOWS: Mapping[str, Mapping[str, Mapping[str, Any]]] = {
    "llama": {"everything": {}},
    "mistral": {"everything": {}, "window": {"sliding_window": _WINDOW}},
    "qwen2": {
        "everything": {},
        "window": {
            "use_sliding_window": True,
            "sliding_window": _WINDOW,
            "max_window_layers": 0,
        },
        "window-from-1": {
            "use_sliding_window": True,
            "sliding_window": _WINDOW,
            "max_window_layers": 1,
        },
    },
    "qwen3": {
        "everything": {},
        "window": {
            "use_sliding_window": True,
            "sliding_window": _WINDOW,
            "max_window_layers": 0,
        },
        "window-by-layer": {
            "use_sliding_window": True,
            "sliding_window": _WINDOW,
            "layer_types": [_SLIDING, _FULL, _SLIDING],
        },
    },
}
"""Which sliding windows each family of transformers can have."""


@dataclasses.dataclass(frozen=True)
class Variant:
    """One kind of model."""

    id: str
    family: str
    changes: Mapping[str, Any] = dataclasses.field(hash=False)


def product() -> list[Variant]:
    """Every family x heads x tied x rotary embedding x sliding window."""
    variants = []
    for family in FAMILIES:
        factors = (HEADS, TIED, ROPES, WINDOWS[family])
        for names in itertools.product(*factors):
            changes: dict[str, Any] = {}
            for factor, name in zip(factors, names, strict=True):
                changes |= factor[name]
            variants.append(Variant("-".join((family, *names)), family, changes))
    return variants


def pairwise(rows: Sequence[tuple[str, ...]]) -> list[int]:
    """Indices of a few rows in which every pair of values that any row has occurs (greedy)."""

    def pairs(row: tuple[str, ...]) -> set[tuple[int, str, int, str]]:
        marked = enumerate(row)
        return {(i, a, j, b) for (i, a), (j, b) in itertools.combinations(marked, 2)}

    having = [pairs(row) for row in rows]
    missing = set().union(*having)
    chosen = []
    while missing:
        best = max(range(len(rows)), key=lambda i: (len(having[i] & missing), -i))
        chosen.append(best)
        missing -= having[best]
    return sorted(chosen)


def _rope(kind: str, **changes: Any) -> dict[str, Any]:
    values = dict(ROPES[kind])
    parameters = {**values["rope_parameters"], **changes}
    values["rope_parameters"] = {k: v for k, v in parameters.items() if v is not ...}
    return values


EXTRAS: tuple[Variant, ...] = (
    Variant("llama-attention-bias", "llama", {"attention_bias": True}),
    Variant("llama-mlp-bias", "llama", {"mlp_bias": True}),
    Variant(
        "llama-both-biases-mqa-tied",
        "llama",
        {"attention_bias": True, "mlp_bias": True, **HEADS["mqa"], **TIED["tied"]},
    ),
    Variant("llama-heads-of-smollm", "llama", {
        "hidden_size": 72, "num_attention_heads": 9, "num_key_value_heads": 3, "head_dim": 8,
    }),
    Variant("llama-wide-heads", "llama", {"head_dim": 32}),
    Variant("llama-theta-from-top-level", "llama", {"rope_theta": 1_000_000.0}),
    Variant("llama-large-epsilon", "llama", {"rms_norm_eps": 0.1}),
    Variant("mistral-wide-heads", "mistral", {"head_dim": 32, "sliding_window": _WINDOW}),
    # Not 1: transformers 5.23 then keeps every key in its cache (keys[:, :, -0:]).
    Variant("mistral-window-of-2", "mistral", {"sliding_window": 2}),
    Variant("qwen2-mha-as-absent", "qwen2", {"num_key_value_heads": None}),
    Variant("qwen3-attention-bias", "qwen3", {"attention_bias": True}),
    Variant("qwen3-attention-bias-window-by-layer", "qwen3", {
        "attention_bias": True, **WINDOWS["qwen3"]["window-by-layer"],
    }),
    Variant("yarn-attention-factor", "llama", _rope("yarn", attention_factor=1.4)),
    Variant("yarn-mscale", "qwen2", _rope("yarn", mscale=1.5, mscale_all_dim=0.8)),
    Variant("yarn-betas", "qwen3", _rope("yarn", beta_fast=16.0, beta_slow=2.0)),
    Variant("yarn-not-truncated", "llama", _rope("yarn", truncate=False)),
    Variant("yarn-factor-from-lengths", "mistral", _rope("yarn", factor=None)),
    Variant("dynamic-that-states-the-original", "llama", _rope(
        "dynamic", original_max_position_embeddings=64
    )),
    Variant("llama3-factors", "llama", _rope("llama3", low_freq_factor=2.0, high_freq_factor=9.0)),
)  # fmt: skip
"""What the product leaves out: biases, odd sizes, and numbers that rotary embeddings can have."""


def config_class_values(variant: Variant) -> dict[str, Any]:
    """What the configuration class of transformers is called with."""
    return {**BASE, **FAMILIES[variant.family], **variant.changes}


def save_reference(directory: Path, variant: Variant, seed: int = 0) -> None:
    """A model of transformers in a directory, as its own code writes it.

    Weights are large enough that logits differ by far more than rounding; norms and biases lie
    away from one and zero, so that leaving one out shows.
    """
    import torch
    from transformers import CONFIG_MAPPING, AutoModelForCausalLM

    torch.set_num_threads(1)  # tests run in several processes, and the models are tiny
    config = CONFIG_MAPPING[variant.family](**config_class_values(variant))
    model = AutoModelForCausalLM.from_config(config)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            centre, spread = (1.0, 0.3) if "norm" in name else (0.0, 0.13)
            weight.copy_(centre + spread * torch.randn(weight.shape, generator=generator))
    model.save_pretrained(directory)


def load_reference(directory: Path, dtype: str = "float32") -> Any:
    """The model that transformers finds in a directory; nothing may be missing or left over."""
    import torch
    from transformers import AutoModelForCausalLM

    torch.set_num_threads(1)
    model, report = AutoModelForCausalLM.from_pretrained(
        directory,
        dtype=getattr(torch, dtype),
        attn_implementation="eager",
        output_loading_info=True,
    )
    leftovers = {kind: names for kind, names in report.items() if names}
    assert not leftovers, leftovers
    return model.eval()


def logits(model: Any, tokens: np.ndarray) -> np.ndarray:
    """Float32 logits [B, T, V] of a plain pass."""
    import torch

    with torch.no_grad():
        found = model(torch.from_numpy(tokens), use_cache=False).logits
    return np.asarray(found.float().numpy())


def logits_with_cache(
    model: Any, tokens: np.ndarray, lengths: np.ndarray, steps: int
) -> np.ndarray:
    """Float32 logits [B, 1 + steps, V] at the last token of each prompt and at those behind it.

    The prompt of row b is `tokens[b, :lengths[b]]`, read at once; the others follow one by one. A
    row must be longer than those before it ever were: dynamic rotary embeddings are stretched for
    the longest text that the model has seen.
    """
    import torch

    # transformers 5.24 has another name for it.
    name = "cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values"
    rows = []
    for row, length in zip(torch.from_numpy(tokens), lengths.tolist(), strict=True):
        found: list[Any] = []
        past: dict[str, Any] = {}
        with torch.no_grad():
            for part in row[: length + steps].split([length, *[1] * steps]):
                out = model(part[None], **past, use_cache=True)
                past = {name: getattr(out, name)}
                found.append(out.logits[0, -1])
        rows.append(torch.stack(found))
    return np.asarray(torch.stack(rows).float().numpy())


def greedy(model: Any, prompt: Iterable[int], count: int) -> tuple[list[int], np.ndarray]:
    """`count` new tokens by `generate` with its cache, and the logits [count, V] each came from."""
    import torch

    ids = torch.tensor([list(prompt)])
    # A copy: what the checkpoint says of end tokens and sampling does not count here.
    settings = type(model.generation_config)(do_sample=False, pad_token_id=0)
    model.generation_config = settings
    with torch.no_grad():
        out = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=count,
            use_cache=True,
            return_dict_in_generate=True,
            output_logits=True,
        )
    return out.sequences[0, ids.shape[1] :].tolist(), torch.cat(out.logits).float().numpy()


def first_mismatch(
    ours: Sequence[int], theirs: Sequence[int], scores: np.ndarray
) -> tuple[int, float] | None:
    """Where two greedy answers part, and how far apart their two tokens' logits are there."""
    assert len(ours) == len(theirs)
    for i, (a, b) in enumerate(zip(ours, theirs, strict=True)):
        if a != b:
            return i, float(scores[i, b] - scores[i, a])
    return None


def mean_kl(p: np.ndarray, q: np.ndarray) -> float:
    """KL(softmax(p) || softmax(q)) in nats, averaged over positions."""

    def log_softmax(x: np.ndarray) -> np.ndarray:
        x = x.astype(np.float64)
        x = x - x.max(-1, keepdims=True)
        return np.asarray(x - np.log(np.exp(x).sum(-1, keepdims=True)))

    log_p, log_q = log_softmax(p), log_softmax(q)
    return float((np.exp(log_p) * (log_p - log_q)).sum(-1).mean())


def prompt(rows: int = 1, length: int = PROMPT_TOKENS, seed: int = 1) -> np.ndarray:
    """Random token ids [rows, length], none of them special."""
    return np.random.default_rng(seed).integers(3, VOCAB, (rows, length))
