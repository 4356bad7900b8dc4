"""What held-out text says of the weights, and what really decoding with them shows."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax

from mtd_jax.decoding.generate import Completion, generate
from mtd_jax.decoding.language_model import LanguageModel
from mtd_jax.decoding.method import Method
from mtd_jax.decoding.requests import Prompt, without_cycles
from mtd_jax.methods.autoregressive import Autoregressive
from mtd_jax.training.step import Trainer
from mtd_jax.transformer.model import Parameters, prepare_for_decoding
from mtd_jax.transformer.packed import Packed


class HeldOut:
    """Means over held-out batches, each token counting the same."""

    def __init__(self, trainer: Trainer, batches: Callable[[], Iterable[Packed]]) -> None:
        """`batches` gives the same ones every time."""
        self._batches = batches
        self._counts = jax.jit(trainer.objective.counts)
        self._measure = jax.jit(trainer.measure)
        self._total: Any = None

    def __call__(self, trainable: Any, frozen: Any) -> dict[str, float]:
        """The objective's measurements."""
        if self._total is None:
            parts = [self._counts(batch) for batch in self._batches()]
            self._total = jax.tree.map(lambda *x: sum(x[1:], x[0]), *parts)
        shares = [self._measure(trainable, frozen, batch, self._total) for batch in self._batches()]
        fetched = jax.device_get(shares)
        return {name: float(sum(share[name] for share in fetched)) for name in fetched[0]}


class Decoding:
    """Answers to a few prompts by the weights as they are, beside those from before training."""

    def __init__(
        self, trainer: Trainer, base: LanguageModel, prompts: Sequence[Prompt], new_tokens: int
    ) -> None:
        """Lets the base answer; of it, all but the weights is kept."""
        self._trainer = trainer
        self._prompts = prompts
        self._new_tokens = new_tokens
        self._shell = dataclasses.replace(base, params=jax.eval_shape(lambda x: x, base.params))
        self._before = self._answers(base.params, Autoregressive())

    def __call__(self, trainable: Any, frozen: Any) -> dict[str, float]:
        """Tokens a step that the method really gets, and how much of the answers has stayed.

        `decoded_as_before` is the share of the untrained model's greedy tokens that come before the
        first difference: 1 for a method that is lossless.
        """
        params, method = self._trainer.objective.decoder(trainable, frozen)
        dtype = self._shell.params.embedding.dtype
        after = self._answers(jax.tree.map(lambda x: x.astype(dtype), params), method)
        pairs = list(zip(self._before, after, strict=True))
        same = sum(_same(a.token_ids, b.token_ids) for a, b in pairs)
        found = {"decoded_as_before": same / max(sum(len(a.token_ids) for a, _ in pairs), 1)}
        forwards = sum(b.metrics.forwards for _, b in pairs)
        if method.max_emit > 1 and forwards:
            tokens = sum(len(b.token_ids) for _, b in pairs)
            found["decoded_tokens_per_forward"] = tokens / forwards
        return found

    def _answers(self, params: Parameters, method: Method) -> list[Completion]:
        model = dataclasses.replace(self._shell, params=params)
        if self._shell.mesh is None or self._shell.mesh.size == 1:
            model = dataclasses.replace(model, params=prepare_for_decoding(params), mesh=None)
        return generate(
            model,
            method,
            self._prompts if method.has_cycles else without_cycles(self._prompts),
            max_new_tokens=self._new_tokens,
            batch_size=len(self._prompts),
        )


def _same(a: Sequence[int], b: Sequence[int]) -> int:
    count = 0
    for x, y in zip(a, b, strict=False):
        if x != y:
            break
        count += 1
    return count
