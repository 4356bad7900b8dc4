"""The decoder as a book would write it: numpy, float64, a row and a head at a time, no cache."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from mtd_jax.transformer.block import Block
from mtd_jax.transformer.model import Parameters


def logits(params: Parameters, tokens: list[int]) -> np.ndarray:
    """[T, V] logits of one text."""
    p = in_numpy(params)
    return output(p, hidden(p, tokens))


def in_numpy(params: Any) -> Any:
    """Every leaf in float64."""
    return jax.tree.map(lambda w: np.asarray(w, np.float64), params)


def hidden(p: Parameters, tokens: list[int]) -> np.ndarray:
    """[T, D] what the last layer puts out; `p` holds numpy arrays."""
    return layers(p, np.stack([p.embedding[t] for t in tokens]), 0, p.config.num_layers)


def layers(
    p: Parameters, x: np.ndarray, start: int, stop: int, places: Sequence[int] | None = None
) -> np.ndarray:
    """[T, D] through layers start..stop-1; `p` holds numpy arrays.

    `places` are the rows' positions, ascending; by default 0, 1, ...
    """
    config = p.config
    at = np.arange(len(x)) if places is None else np.asarray(places)
    for layer in range(start, stop):
        block: dict[str, Any] = {
            name: None if (w := getattr(p.blocks, name)) is None else w[layer]
            for name in Block.__dataclass_fields__
        }
        window = None if config.sliding_windows is None else config.sliding_windows[layer]
        x = x + _attention(config, block, _norm(x, block["attention_norm"], config), at, window)
        x = x + _mlp(block, _norm(x, block["mlp_norm"], config))
    return x


def output(p: Parameters, x: np.ndarray) -> np.ndarray:
    """[T, V] logits of what the last layer puts out."""
    head = p.embedding.T if p.head is None else p.head
    return capped(normed(p, x) @ head, p.config)


def normed(p: Parameters, x: np.ndarray) -> np.ndarray:
    """[T, D] behind the final norm."""
    return _norm(x, p.final_norm, p.config)


def capped(logits: np.ndarray, config: Any) -> np.ndarray:
    """Squeezed, where the config says so."""
    cap = config.final_logit_softcap
    return logits if cap is None else cap * np.tanh(logits / cap)


def greedy(
    params: Parameters, prompt: list[int], budget: int, stop_ids: tuple[int, ...]
) -> list[int]:
    """The whole text is run again for every token."""
    tokens = list(prompt)
    while len(tokens) - len(prompt) < budget:
        tokens.append(int(np.argmax(logits(params, tokens)[-1])))
        if tokens[-1] in stop_ids:
            break
    return tokens[len(prompt) :]


def _norm(x: np.ndarray, scale: np.ndarray, config: Any) -> np.ndarray:
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + config.norm_eps) * scale


def _rotate(x: np.ndarray, at: np.ndarray, config: Any) -> np.ndarray:
    """[T, H], row t at position `at[t]`: the pairs (i, i + H/2) turn by at theta^(-2i/H)."""
    half = config.head_dim // 2
    out = np.empty_like(x)
    for i in range(half):
        angle = at * config.rope.theta ** (-i / half)
        out[:, i] = x[:, i] * np.cos(angle) - x[:, i + half] * np.sin(angle)
        out[:, i + half] = x[:, i + half] * np.cos(angle) + x[:, i] * np.sin(angle)
    return out


def _attention(
    config: Any, block: Any, x: np.ndarray, at: np.ndarray, window: int | None
) -> np.ndarray:
    rows, group = x.shape[0], config.group_size
    heads = np.zeros((rows, config.num_kv_heads, group, config.head_dim))
    for key_head in range(config.num_kv_heads):
        for shared in range(group):
            q, k, v = (
                _project(config, block, x, at, key_head, j) for j in (shared, group, group + 1)
            )
            for t in range(rows):
                first = 0 if window is None else np.searchsorted(at, at[t] - window, side="right")
                scores = k[first : t + 1] @ q[t] / math.sqrt(config.head_dim)
                cap = config.attention_logit_softcap
                scores = scores if cap is None else cap * np.tanh(scores / cap)
                weights = np.exp(scores - scores.max())
                weights /= weights.sum()
                heads[t, key_head, shared] = weights @ v[first : t + 1]
    flat = heads.reshape(rows, -1)
    out = flat @ block["attention_out"].reshape(flat.shape[1], -1)
    bias = block["attention_out_bias"]
    return out if bias is None else out + bias


def _project(
    config: Any, block: Any, x: np.ndarray, at: np.ndarray, key_head: int, j: int
) -> np.ndarray:
    """[T, H] of member j of a group: a query head, the key (G) or the value (G + 1)."""
    out = x @ block["qkv"][:, key_head, j]
    if block["qkv_bias"] is not None:
        out = out + block["qkv_bias"][key_head, j]
    if j == config.group_size + 1:
        return out
    scale = block["k_norm"] if j == config.group_size else block["q_norm"]
    if scale is not None:
        out = _norm(out, scale, config)
    return _rotate(out, at, config)


def _mlp(block: Any, x: np.ndarray) -> np.ndarray:
    gate, up = (x @ block["gate_up"][:, i] for i in (0, 1))
    if block["gate_up_bias"] is not None:
        gate, up = gate + block["gate_up_bias"][0], up + block["gate_up_bias"][1]
    out = (gate / (1 + np.exp(-gate)) * up) @ block["down"]
    return out if block["down_bias"] is None else out + block["down_bias"]
