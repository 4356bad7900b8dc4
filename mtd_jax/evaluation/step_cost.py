"""What a decode step costs by its number of rows, on this machine: what `auto` decides by."""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mtd_jax.decoding import engine
from mtd_jax.decoding.language_model import LanguageModel
from mtd_jax.decoding.method import Method, Requests
from mtd_jax.decoding.prompt import bucket_prompt
from mtd_jax.decoding.sampling import Sampling, SamplingRows
from mtd_jax.errors import InputError
from mtd_jax.evaluation import environment

_ROUNDS = 3
_TRIALS = 9


def is_adaptive(method: Method) -> bool:
    """Whether the method chooses its number of drafts by costs."""
    return bool(getattr(method, "auto", False))


def calibrated(
    model: LanguageModel,
    method: Any,
    *,
    batch_size: int = 1,
    prompt_tokens: int = 64,
    cache: Path | None = None,
    fresh: bool = False,
) -> Any:
    """The method with the costs of its steps measured; methods without a choice stay as they are.

    Takes about a second beside compiling the program that decoding needs anyway.

    Args:
      batch_size: prompts decoded together.
      prompt_tokens: about how long they are.
      cache: a JSON file where measured costs are kept, by model, machine, method and sizes.
      fresh: measure although they are known, and keep what is found.
    """
    if batch_size < 1:
        raise InputError(f"batch_size must be at least 1, got {batch_size}")
    if not is_adaptive(method):
        return method
    key = _key(model, method, batch_size, prompt_tokens)
    known = _read(cache)
    if fresh or not _usable(known.get(key), len(method.sizes)):
        known[key] = measure(model, method, batch_size=batch_size, prompt_tokens=prompt_tokens)
        _write(cache, known)
    return method.replace(costs=jnp.asarray(known[key], jnp.float32))


def measure(
    model: LanguageModel, method: Any, *, batch_size: int = 1, prompt_tokens: int = 64
) -> list[float]:
    """Seconds of a step for each of the method's sizes, drafts included.

    The decode loop itself is timed, with costs that leave it no choice. Sizes take turns, and what
    counts is the median of their ratios within a turn: a machine may be slow for seconds at a time.
    """
    size = -(-batch_size // model.batch_multiple) * model.batch_multiple
    padded = bucket_prompt(min(prompt_tokens, model.config.context_length - 1))
    requests = Requests(
        budget=jnp.full(size, 2**30, jnp.int32),
        stop_ids=jnp.full(8, -1, jnp.int32),
        sampling=SamplingRows.of([Sampling()] * size),
        cycle=jnp.zeros(size, jnp.int32),
    )
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, model.config.vocab_size, (size, padded), dtype=np.int32)
    lengths = np.full(size, min(prompt_tokens, padded), np.int32)
    forced = [method.replace(costs=jnp.asarray(c)) for c in _forcing(len(method.sizes))]
    if hasattr(method, "threshold"):
        forced = [m.replace(threshold=jnp.float32(0)) for m in forced]
    capacity = engine.prompt_capacity(model.params, method, padded)
    seconds = np.zeros((_TRIALS + 1, len(forced)))
    with model.on_mesh():
        # Begun by a forced method as well: what it keeps between steps may say when drafting ends.
        state, _ = engine.start(
            forced[0], model.params, jnp.asarray(tokens), jnp.asarray(lengths), requests, capacity
        )
        for trial in range(_TRIALS + 1):  # the first one compiles
            for i, candidate in enumerate(forced):
                # Back to the prompt, so that every trial sees a text of the same length.
                state = state.replace(cache=state.cache.replace(length=jnp.asarray(lengths)))
                began = time.perf_counter()
                state, output = engine.run(candidate, model.params, state, _ROUNDS)
                jax.block_until_ready(output)
                seconds[trial, i] = (time.perf_counter() - began) / _ROUNDS
    fewest = seconds[1:, :1]
    costs: list[float] = (np.median(fewest) * np.median(seconds[1:] / fewest, axis=0)).tolist()
    return costs


def _forcing(sizes: int) -> np.ndarray:
    """[sizes, sizes] costs: row i makes every size but i as good as impossible."""
    costs = np.full((sizes, sizes), 1e30, np.float32)
    np.fill_diagonal(costs, 1.0)
    return costs


def _key(model: LanguageModel, method: Any, batch_size: int, prompt_tokens: int) -> str:
    parts = {
        "model": model.fingerprint,
        "dtype": str(model.params.embedding.dtype),
        "mesh": None if model.mesh is None else dict(model.mesh.shape),
        "method": method.name,
        "program": _program(method),
        "batch": batch_size,
        "prompt": bucket_prompt(prompt_tokens),
        "hardware": environment.hardware(),
        "jax": jax.__version__,
    }
    return json.dumps(parts, sort_keys=True)


def _program(method: Any) -> str:
    """A digest of what a method's program is compiled for: its settings, and the shapes it has."""
    leaves, structure = jax.tree.flatten(method)
    shapes = [(x.shape, str(x.dtype)) for x in map(jnp.asarray, leaves)]
    return hashlib.sha256(f"{structure} {shapes}".encode()).hexdigest()


def _read(cache: Path | None) -> dict[str, list[float]]:
    """What was measured before; a file that cannot be read is measured anew."""
    try:
        found = json.loads(cache.read_text(encoding="utf-8")) if cache is not None else {}
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _write(cache: Path | None, known: dict[str, list[float]]) -> None:
    if cache is None:
        return
    temporary = cache.with_name(f".{cache.name}.{time.time_ns()}")
    # A place that cannot be written costs a measurement in the next run, and nothing now.
    with contextlib.suppress(OSError):
        cache.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_text(json.dumps(known, indent=1), encoding="utf-8")
        temporary.replace(cache)


def _usable(costs: Any, sizes: int) -> bool:
    """Whether what was kept are costs at all: files are edited, and broken."""
    return (
        isinstance(costs, list)
        and len(costs) == sizes
        and all(isinstance(cost, float) and 0 < cost < math.inf for cost in costs)
    )
