"""From prompts to text: batches, the engine's calls, and what is read off them.

Streaming and whole runs are one code path. `stream` yields what every drain of the engine brings;
`generate(..., stream=False)` adds those pieces up.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Literal, NamedTuple, TypeAlias, cast, overload

import jax
import jax.numpy as jnp
import numpy as np

from mtd_jax import backend
from mtd_jax.decoding import engine
from mtd_jax.decoding.clock import Clock
from mtd_jax.decoding.language_model import LanguageModel
from mtd_jax.decoding.method import DecodeState, Method, Requests, Tally, check
from mtd_jax.decoding.metrics import Metrics
from mtd_jax.decoding.prompt import bucket_prompt
from mtd_jax.decoding.requests import (
    DEFAULT_NEW_TOKENS,
    AnyPrompt,
    EncodedPrompt,
    Prompt,
    as_prompt,
    encode,
)
from mtd_jax.decoding.sampling import Sampling, SamplingRows
from mtd_jax.decoding.stopping import StopMatcher
from mtd_jax.decoding.traffic import cache_bytes, weight_bytes
from mtd_jax.errors import InputError
from mtd_jax.sharding import fetched
from mtd_jax.tokenizer import TextStream, Tokenizer
from mtd_jax.typing import is_whole

FinishReason: TypeAlias = Literal["stop", "length", "context"]

_STREAM_ROUNDS = 8
_STOP_ID_SLOTS = 8
_MOST_ROWS = 2**16


@dataclasses.dataclass(frozen=True)
class Chunk:
    """What one drain brought for one prompt."""

    index: int
    """Which of the prompts, from 0."""
    id: str
    text: str
    """Text that is certain by now: no half characters, no half stop strings."""
    token_ids: tuple[int, ...]
    prompt_tokens: int
    finish_reason: FinishReason | None
    """`stop` (an end token or a stop string), `length` (the budget), `context` (no room left);
    None while the answer goes on."""
    metrics: Metrics
    """Of this prompt, up to here."""


@dataclasses.dataclass(frozen=True)
class Completion:
    """The whole answer to one prompt."""

    id: str
    text: str
    token_ids: tuple[int, ...]
    """New tokens, an end token included."""
    prompt_tokens: int
    finish_reason: FinishReason
    metrics: Metrics


@overload
def generate(
    model: LanguageModel,
    method: Method,
    prompts: AnyPrompt | Sequence[AnyPrompt],
    *,
    sampling: Sampling | Sequence[Sampling] = ...,
    max_new_tokens: int = ...,
    stop: Sequence[str] = ...,
    chat: bool | None = ...,
    batch_size: int = ...,
    ignore_eos: bool = ...,
    stream: Literal[False] = ...,
) -> list[Completion]: ...


@overload
def generate(
    model: LanguageModel,
    method: Method,
    prompts: AnyPrompt | Sequence[AnyPrompt],
    *,
    sampling: Sampling | Sequence[Sampling] = ...,
    max_new_tokens: int = ...,
    stop: Sequence[str] = ...,
    chat: bool | None = ...,
    batch_size: int = ...,
    ignore_eos: bool = ...,
    stream: Literal[True],
) -> Iterator[Chunk]: ...


def generate(
    model: LanguageModel,
    method: Method,
    prompts: AnyPrompt | Sequence[AnyPrompt],
    *,
    sampling: Sampling | Sequence[Sampling] = Sampling(),  # noqa: B008 (frozen)
    max_new_tokens: int = DEFAULT_NEW_TOKENS,
    stop: Sequence[str] = (),
    chat: bool | None = None,
    batch_size: int = 1,
    ignore_eos: bool = False,
    stream: bool = False,
) -> list[Completion] | Iterator[Chunk]:
    """Answers prompts.

    Args:
      model: what `load` returned.
      method: how to decode, e.g. `methods.autoregressive()`.
      prompts: one prompt or several: text, token ids, `{"messages": [...]}` or `Prompt`.
      sampling: for all prompts, or one for each; a prompt's own seed goes before its.
      max_new_tokens: budget of each prompt that does not state its own.
      stop: strings that end an answer and are cut off it.
      chat: wrap plain text in the chat template; None does so where there is one.
      batch_size: prompts decoded together; part of a batch is filled up (no new program).
      ignore_eos: go on behind end tokens (for benchmarks).
      stream: return an iterator of `Chunk`s as they come instead of a list of `Completion`s.

    Raises:
      InputError: any prompt or value is wrong; nothing has been decoded then.
    """
    if not is_whole(batch_size) or not 1 <= batch_size <= _MOST_ROWS:
        raise InputError(f"batch_size must be from 1 to {_MOST_ROWS}, got {batch_size!r}")
    stop = [stop] if isinstance(stop, str) else stop
    requests = _encode_all(model, prompts, max_new_tokens, chat)
    check(method, model.config, frozenset(r.cycle for r in requests if r.cycle))
    samplings = [sampling] * len(requests) if isinstance(sampling, Sampling) else list(sampling)
    if len(samplings) != len(requests):
        raise InputError(f"{len(samplings)} sampling values for {len(requests)} prompts")
    samplings = [r.sampling(asked) for r, asked in zip(requests, samplings, strict=True)]
    if stop and model.tokenizer is None:
        raise InputError("stop strings need a tokenizer, and the model has none")
    StopMatcher(stop)  # refuses an empty string before anything runs
    rounds = _STREAM_ROUNDS if stream or stop else engine.MAX_ROUNDS
    chunks = _decode(model, method, requests, samplings, stop, batch_size, ignore_eos, rounds)
    return chunks if stream else collect(chunks, len(requests))


def collect(chunks: Iterator[Chunk], count: int) -> list[Completion]:
    """The completions that a stream of `count` prompts adds up to, in the prompts' order."""
    texts: list[list[str]] = [[] for _ in range(count)]
    ids: list[list[int]] = [[] for _ in range(count)]
    done: dict[int, Completion] = {}
    for chunk in chunks:
        texts[chunk.index].append(chunk.text)
        ids[chunk.index].extend(chunk.token_ids)
        if chunk.finish_reason is not None:
            done[chunk.index] = Completion(
                id=chunk.id,
                text="".join(texts[chunk.index]),
                token_ids=tuple(ids[chunk.index]),
                prompt_tokens=chunk.prompt_tokens,
                finish_reason=chunk.finish_reason,
                metrics=chunk.metrics,
            )
    return [done[i] for i in range(count)]


def _encode_all(
    model: LanguageModel,
    prompts: AnyPrompt | Sequence[AnyPrompt],
    max_new_tokens: int,
    chat: bool | None,
) -> list[EncodedPrompt]:
    if isinstance(prompts, str | Prompt | Mapping) or (
        isinstance(prompts, np.ndarray) and prompts.ndim == 1
    ):
        values: list[AnyPrompt] = [prompts]
    elif not isinstance(prompts, Sequence | np.ndarray):
        raise InputError(f"prompts are text, token ids or objects, not {type(prompts).__name__}")
    elif all(isinstance(value, int | np.integer) for value in prompts):
        values = [cast("Sequence[int]", prompts)]  # one prompt of token ids
    else:
        values = list(cast("Sequence[AnyPrompt]", prompts))
    if not values:
        raise InputError("no prompts")
    return [
        encode(
            as_prompt(value, i),
            model.config,
            model.tokenizer,
            max_new_tokens=max_new_tokens,
            chat=chat,
        )
        for i, value in enumerate(values)
    ]


def _decode(
    model: LanguageModel,
    method: Method,
    requests: list[EncodedPrompt],
    samplings: list[Sampling],
    stop: Sequence[str],
    batch_size: int,
    ignore_eos: bool,
    rounds: int,
) -> Iterator[Chunk]:
    stop_ids = () if ignore_eos else model.eos_token_ids
    for first in range(0, len(requests), batch_size):
        part = slice(first, first + batch_size)
        rows = [
            _Row(first + i, request, model.tokenizer, stop, stop_ids)
            for i, request in enumerate(requests[part])
        ]
        yield from _decode_batch(model, method, rows, samplings[part], stop_ids, batch_size, rounds)
        backend.release_programs()


def _decode_batch(
    model: LanguageModel,
    method: Method,
    rows: list[_Row],
    samplings: list[Sampling],
    stop_ids: tuple[int, ...],
    batch_size: int,
    rounds: int,
) -> Iterator[Chunk]:
    """One batch from its prompts to its last token; the clock stands still between drains."""
    tokens, lengths, wanted = _batch_arrays(model, rows, samplings, stop_ids, batch_size)
    capacity = engine.prompt_capacity(model.params, method, tokens.shape[1])
    metrics = Metrics()
    with model.on_mesh():
        with Clock() as clock:
            state, output = engine.start(method, model.params, tokens, lengths, wanted, capacity)
            drained = _drain(output, state)
        metrics = metrics.with_prompt(clock)
    costs = _Traffic(method, model, len(rows))
    while True:
        for i, row in enumerate(rows):
            if not row.finished:
                news = drained.emitted[i, : drained.counts[i]]
                tally = jax.tree.map(lambda x, i=i: x[i], drained.tally)
                yield row.take(news, bool(drained.active[i]), costs.added(metrics, tally, row))
        filling = len(drained.active) - len(rows)
        keep = np.array([not row.finished for row in rows] + [False] * filling)
        if not keep.any():
            return
        with model.on_mesh(), Clock() as clock:
            state, output = engine.run(method, model.params, state, rounds, keep)
            drained = _drain(output, state)
        metrics = metrics.with_steps(clock)


def _batch_arrays(
    model: LanguageModel,
    rows: list[_Row],
    samplings: list[Sampling],
    stop_ids: tuple[int, ...],
    batch_size: int,
) -> tuple[jax.Array, jax.Array, Requests]:
    """Prompts, lengths and requests, filled up to a batch that the mesh divides."""
    size = -(-batch_size // model.batch_multiple) * model.batch_multiple
    blank = size - len(rows)
    prompts = [row.request.token_ids for row in rows] + [(0,)] * blank
    padded = bucket_prompt(max(len(p) for p in prompts))
    tokens = np.zeros((size, padded), np.int32)
    for i, prompt in enumerate(prompts):
        tokens[i, : len(prompt)] = prompt
    slots = max(_STOP_ID_SLOTS, len(stop_ids))
    wanted = Requests(
        budget=jnp.asarray([row.request.budget for row in rows] + [0] * blank, jnp.int32),
        stop_ids=jnp.asarray([*stop_ids, *[-1] * (slots - len(stop_ids))], jnp.int32),
        sampling=SamplingRows.of([*samplings, *[Sampling()] * blank]),
        cycle=jnp.asarray([row.request.cycle for row in rows] + [0] * blank, jnp.int32),
    )
    return jnp.asarray(tokens), jnp.asarray([len(p) for p in prompts], jnp.int32), wanted


class _Drained(NamedTuple):
    """What the host takes off the device between calls, a row for each of the batch."""

    counts: np.ndarray
    emitted: np.ndarray
    active: np.ndarray
    tally: Tally


def _drain(output: engine.Output, state: DecodeState) -> _Drained:
    wanted = (output.count, output.tokens, state.active, state.tally)
    return _Drained(*fetched(wanted))


class _Traffic:
    """Turns a row's tally into figures; what a pass must read is worked out once for a batch."""

    def __init__(self, method: Method, model: LanguageModel, batch: int) -> None:
        self._params = model.params
        self._batch = batch
        self._step = weight_bytes(model.params)
        self._method = method

    def added(self, metrics: Metrics, tally: Tally, row: _Row) -> Metrics:
        """The times with what the row's tally says beside them."""
        forwards, drafted = int(tally.forwards), int(tally.drafted)
        length = len(row.request.token_ids) + row.tokens / 2
        cached = cache_bytes(self._params, self._batch, length)
        part = self._method.partial_bytes(self._params, cached)
        return dataclasses.replace(
            metrics,
            forwards=forwards,
            drafted=drafted,
            histogram=tuple(int(n) if drafted else 0 for n in tally.histogram),
            bytes_read=max(forwards - 1, 0) * (self._step + cached) + int(tally.partial) * part,
        )


class _Row:
    """The host's side of one prompt in a batch: text so far, and why it ended."""

    def __init__(
        self,
        index: int,
        request: EncodedPrompt,
        tokenizer: Tokenizer | None,
        stop: Sequence[str],
        stop_ids: tuple[int, ...],
    ) -> None:
        self.index = index
        self.request = request
        self.finished = False
        self._stop_ids = frozenset(stop_ids)
        self._text = None if tokenizer is None else TextStream(tokenizer)
        self._matcher = StopMatcher(stop)
        self.tokens = 0

    def take(self, tokens: np.ndarray, active: bool, metrics: Metrics) -> Chunk:
        """What the newest tokens add; `active` is False where the engine ended the row."""
        taken: list[int] = []
        text = ""
        for token in tokens.tolist():
            taken.append(token)
            if self._text is not None:
                text += self._matcher.push(self._text.push([token]))
            if self._matcher.stopped:
                break
        self.finished = self._matcher.stopped or not active
        if self.finished and self._text is not None:
            text += self._matcher.push(self._text.flush()) + self._matcher.flush()
        self.tokens += len(taken)
        return Chunk(
            index=self.index,
            id=self.request.id,
            text=text,
            token_ids=tuple(taken),
            prompt_tokens=len(self.request.token_ids),
            finish_reason=self._reason(taken) if self.finished else None,
            metrics=dataclasses.replace(metrics, tokens=self.tokens),
        )

    def _reason(self, taken: list[int]) -> FinishReason:
        if self._matcher.stopped or (taken and taken[-1] in self._stop_ids):
            return "stop"
        return "context" if self.request.ends_at_context else "length"
