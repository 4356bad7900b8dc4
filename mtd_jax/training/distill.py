"""Self-distillation: what a model is to answer, how each answer is drawn, and in which batches.

Heads are to guess what their base model says, so its own answers are their best training text
(Medusa-2 trains on them, arXiv 2401.10774, section 2.3.2). Temperatures are mixed: greedy answers
alone would teach only the model's most likely words.

Everything about an answer follows from its id: temperature, seed, and the batch it is in. A run
that was interrupted therefore goes on to the same answers.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from mtd_jax.decoding.generate import Chunk, collect, generate
from mtd_jax.decoding.language_model import LanguageModel
from mtd_jax.decoding.method import Method
from mtd_jax.decoding.metrics import Metrics, total
from mtd_jax.decoding.requests import DEFAULT_NEW_TOKENS, Prompt, encode, prompt_token_ids
from mtd_jax.decoding.sampling import Sampling
from mtd_jax.errors import InputError

WINDOW = 32
"""Batches whose prompts are sorted by length together: enough that the prompts of a batch are
nearly equally long, few enough that every part of a run is as mixed as the whole."""


@dataclasses.dataclass(frozen=True)
class Recipe:
    """How prompts are answered.

    Raises:
      InputError: a value outside its range.
    """

    max_new_tokens: int = DEFAULT_NEW_TOKENS
    temperatures: tuple[float, ...] = (0.0, 0.7, 1.0)
    """Each answer takes one of these, all equally often; naming one twice doubles its share."""
    top_p: float = 1.0
    samples: int = 1
    """Answers to each prompt, which take turns through the temperatures."""
    seed: int = 0
    max_prompt_tokens: int = 2048
    """Longer prompts are left out, and counted."""

    def __post_init__(self) -> None:
        for name in ("max_new_tokens", "samples", "max_prompt_tokens"):
            if getattr(self, name) < 1:
                raise InputError(f"{name} must be at least 1, got {getattr(self, name)}")
        if not self.temperatures:
            raise InputError("give at least one temperature")
        for temperature in self.temperatures:
            Sampling(temperature=temperature, top_p=self.top_p, seed=self.seed)
        # From any place in the list on, so many answers in a row: is one of them greedy twice?
        turns = -(-self.samples // len(self.temperatures))
        greedy = self.temperatures.count(0.0)
        if greedy and self.samples > 1 and (turns > 1 or greedy > 1):
            raise InputError(
                f"{self.samples} samples of temperatures {_listed(self.temperatures)} hold the "
                "greedy answer more than once: take fewer samples or leave out temperature 0"
            )


@dataclasses.dataclass(frozen=True)
class Task:
    """One answer to write."""

    id: str
    """The prompt's, and behind it `#` and a number where prompts are answered several times."""
    token_ids: tuple[int, ...]
    budget: int
    sampling: Sampling


@dataclasses.dataclass(frozen=True)
class Plan:
    """All answers to write."""

    tasks: tuple[Task, ...]
    left_out: int
    """Prompts that are too long."""

    @property
    def fingerprint(self) -> str:
        """16 hex digits of SHA-256 over what is asked; equal plans ask the same."""
        asked = [[task.id, task.token_ids, task.budget] for task in self.tasks]
        return hashlib.sha256(json.dumps(asked).encode()).hexdigest()[:16]


def make_plan(model: LanguageModel, prompts: Sequence[Prompt], recipe: Recipe) -> Plan:
    """Which answers a recipe asks for.

    Raises:
      InputError: a prompt that cannot be used, an id given twice, or no prompt short enough.
    """
    # Both bounds hold: a prompt too long for the model is left out like any other long one.
    longest = min(recipe.max_prompt_tokens, model.config.context_length - 1)
    tasks: list[Task] = []
    seen: set[str] = set()
    left_out = 0
    for prompt in prompts:
        if prompt.id in seen:
            raise InputError(f"two prompts have the id '{prompt.id[:100]}'")
        seen.add(prompt.id)
        ids = prompt_token_ids(prompt, model.tokenizer, chat=None)
        if len(ids) > longest:
            left_out += 1
            continue
        known = dataclasses.replace(prompt, text=None, messages=None, token_ids=ids)
        budget = recipe.max_new_tokens
        encoded = encode(known, model.config, None, max_new_tokens=budget, chat=None)
        for sample in range(recipe.samples):
            name = prompt.id if recipe.samples == 1 else f"{prompt.id}#{sample}"
            sampling = _sampling(recipe, prompt.id, sample)
            tasks.append(Task(name, encoded.token_ids, encoded.budget, sampling))
    if not tasks:
        raise InputError(f"no prompt has at most {longest} tokens")
    return Plan(tuple(tasks), left_out)


def batches(tasks: Sequence[Task], size: int) -> Iterator[list[Task]]:
    """Tasks of about the same prompt length together, a window of `WINDOW` batches at a time."""
    for first in range(0, len(tasks), size * WINDOW):
        window = sorted(tasks[first : first + size * WINDOW], key=lambda t: len(t.token_ids))
        for start in range(0, len(window), size):
            yield window[start : start + size]


def answer(
    model: LanguageModel,
    method: Method,
    batch: Sequence[Task],
    batch_size: int,
    seen: Callable[[int], None],
) -> tuple[list[dict[str, Any]], Metrics]:
    """Writes the answers of one batch, as lines for a training file, in the batch's order.

    Args:
      batch_size: rows to decode with; a smaller batch is filled up and compiles nothing.
      seen: is called with the number of new tokens, as they come.
    """
    chunks = generate(
        model,
        method,
        [Prompt(task.id, token_ids=task.token_ids, max_new_tokens=task.budget) for task in batch],
        sampling=[task.sampling for task in batch],
        batch_size=batch_size,
        stream=True,  # a few tokens at a time, so that a signal does not wait for the batch
    )
    completions = collect(_watched(chunks, seen), len(batch))
    lines = [
        {
            "id": task.id,
            "token_ids": [*task.token_ids, *done.token_ids],
            "prompt_tokens": done.prompt_tokens,
            "temperature": task.sampling.temperature,
            "seed": task.sampling.seed,
            "finish_reason": done.finish_reason,
            "answer_text": done.text,
        }
        for task, done in zip(batch, completions, strict=True)
    ]
    return lines, total([done.metrics for done in completions], batch_size)


def _watched(chunks: Iterator[Chunk], seen: Callable[[int], None]) -> Iterator[Chunk]:
    for chunk in chunks:
        seen(len(chunk.token_ids))
        yield chunk


def _sampling(recipe: Recipe, prompt: str, sample: int) -> Sampling:
    """How one answer is drawn: hashed from the prompt's id, whatever else is in the file."""
    words = hashlib.sha256(f"{recipe.seed}\n{sample}\n{prompt}".encode()).digest()
    turn = hashlib.sha256(f"{recipe.seed}\n{prompt}".encode()).digest()
    place = int.from_bytes(turn[:8], "big") + sample
    temperature = recipe.temperatures[place % len(recipe.temperatures)]
    # 53 bits: readers whose numbers are doubles keep the seed whole.
    seed = int.from_bytes(words[:8], "big") >> 11
    return Sampling(temperature=temperature, top_p=recipe.top_p, seed=seed)


def _listed(values: Sequence[float]) -> str:
    return ",".join(f"{value:g}" for value in values)
