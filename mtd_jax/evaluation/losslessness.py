"""Does a method emit what plain decoding emits? Answered on anyone's own model and prompts."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mtd_jax.decoding.generate import Completion, generate
from mtd_jax.decoding.language_model import LanguageModel
from mtd_jax.decoding.method import Method
from mtd_jax.decoding.prompt import bucket_prompt
from mtd_jax.decoding.requests import AnyPrompt, as_prompt, encode, without_cycles
from mtd_jax.evaluation.forward import cycles_of, decoded_hidden
from mtd_jax.methods import reference
from mtd_jax.transformer.packed import unpacked

FLOAT32_GAP = 1e-4
"""Logits nearer than this are a tie that the rounding of a product with more rows may break."""


_hidden = jax.jit(decoded_hidden, static_argnums=2)


@dataclasses.dataclass(frozen=True)
class Comparison:
    """One prompt."""

    id: str
    tokens: int
    """That ar emitted."""
    identical: bool
    position: int | None
    """The first new token that differs, from 0; None where none does."""
    logit_gap: float | None
    """There: how far the lower one of the two tokens is below the greatest logit."""
    allowed_gap: float | None
    """What rounding explains: 1e-4 in float32, one unit in the last place in bfloat16."""
    drafted: int = 0
    """Tokens that the method drafted."""
    accepted: int = 0
    """Of these, those that it kept."""

    @property
    def passed(self) -> bool:
        """Identical, or parted by a tie."""
        if self.logit_gap is None or self.allowed_gap is None:
            return self.identical
        return self.logit_gap <= self.allowed_gap


@dataclasses.dataclass(frozen=True)
class LosslessReport:
    """All prompts."""

    comparisons: list[Comparison]

    @property
    def passed(self) -> bool:
        """All of them did."""
        return all(c.passed for c in self.comparisons)

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready values."""
        return {
            "passed": self.passed,
            "prompts": len(self.comparisons),
            "identical": sum(c.identical for c in self.comparisons),
            "ties": sum(c.passed and not c.identical for c in self.comparisons),
            "failed": sum(not c.passed for c in self.comparisons),
            "tokens": sum(c.tokens for c in self.comparisons),
            "num_draft_tokens": sum(c.drafted for c in self.comparisons),
            "num_accepted_draft_tokens": sum(c.accepted for c in self.comparisons),
            "comparisons": [dataclasses.asdict(c) | {"passed": c.passed} for c in self.comparisons],
        }


def verify(
    model: LanguageModel,
    method: Method,
    prompts: Sequence[AnyPrompt],
    *,
    max_new_tokens: int = 128,
    batch_size: int = 1,
    progress: Callable[[str], None] = lambda _: None,
) -> LosslessReport:
    """Decodes every prompt greedily with ar alone and with the method, and compares the tokens.

    Some methods are compared with another model's plain decoding (`methods.reference`). `progress`
    is called twice a batch.
    """
    known = [as_prompt(p, i) for i, p in enumerate(prompts)]
    found = []
    for first in range(0, len(known), batch_size):
        part = known[first : first + batch_size]
        # The baseline one prompt at a time: a batch must not change an answer either.
        progress(f"ar, prompt {first + 1}")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what is to be said is said of the method itself
            plain = generate(
                model, reference(method), without_cycles(part), max_new_tokens=max_new_tokens
            )
        progress(f"{method.name}, prompt {first + 1}")
        other = generate(model, method, part, max_new_tokens=max_new_tokens, batch_size=batch_size)
        for prompt, ours, theirs in zip(part, other, plain, strict=True):
            ids = encode(
                prompt, model.config, model.tokenizer, max_new_tokens=max_new_tokens, chat=None
            ).token_ids
            found.append(compare(model, ids, ours, theirs, method))
    return LosslessReport(found)


def compare(
    model: LanguageModel,
    prompt: tuple[int, ...],
    ours: Completion,
    plain: Completion,
    method: Method,
) -> Comparison:
    """A method's answer to a prompt of these token ids beside plain decoding's.

    `method` says whose logits a tie is judged by (`methods.reference`).
    """
    tokens = len(plain.token_ids)
    drafts = {"drafted": ours.metrics.drafted, "accepted": ours.metrics.accepted}
    if ours.token_ids == plain.token_ids:
        return Comparison(plain.id, tokens, True, None, None, None, **drafts)
    pairs = zip(ours.token_ids, plain.token_ids, strict=False)
    position = next((i for i, (a, b) in enumerate(pairs) if a != b), None)
    if position is None:  # one is the beginning of the other: no tie explains that
        shorter = min(len(ours.token_ids), tokens)
        return Comparison(plain.id, tokens, False, shorter, None, None, **drafts)
    text = [*prompt, *plain.token_ids[:position]]
    # Padded, so that few lengths are compiled.
    padded = min(bucket_prompt(len(text)), model.config.context_length)
    ids = np.zeros((model.batch_multiple, padded), np.int32)
    ids[:, : len(text)] = text
    prompts, lengths = (jnp.full(len(ids), n, jnp.int32) for n in (len(prompt), len(text)))
    judge = reference(method)
    with model.on_mesh():
        batch = unpacked(jnp.asarray(ids), prompts, lengths)
        hidden = _hidden(model.params, batch, cycles_of(judge, model.config))
        row = np.asarray(judge.output(model.params, hidden[:, len(text) - 1]))[0]
    lower = min(row[ours.token_ids[position]], row[plain.token_ids[position]])
    gap = float(row.max() - lower)
    allowed = _allowed(model, float(row.max()))
    return Comparison(plain.id, tokens, False, position, gap, allowed, **drafts)


def _allowed(model: LanguageModel, logit: float) -> float:
    if str(model.params.embedding.dtype) == "float32":
        return FLOAT32_GAP
    bits = 8 if str(model.params.embedding.dtype) == "bfloat16" else 11
    return float(2.0 ** (np.floor(np.log2(max(abs(logit), 1e-6))) - bits + 1))
