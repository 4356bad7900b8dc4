"""How fast the methods decode, measured beside each other in one run.

Machines drift by tens of percent within minutes, so no figure is compared with one from another
run: repeats interleave the methods, every speed-up is the median of ratios within a repeat, and the
bandwidth is measured between them.
"""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Callable, Sequence
from typing import Any

import jax

from mtd_jax.decoding.generate import Completion, generate
from mtd_jax.decoding.language_model import LanguageModel
from mtd_jax.decoding.method import Method
from mtd_jax.decoding.metrics import Metrics, total
from mtd_jax.decoding.requests import AnyPrompt
from mtd_jax.decoding.sampling import Sampling
from mtd_jax.evaluation.roofline import cache_bytes, memory_bandwidth, weight_bytes

BASELINE = "ar"


@dataclasses.dataclass(frozen=True)
class Row:
    """One method at one batch size."""

    method: str
    batch_size: int
    tokens_per_second: float
    """New tokens over all engine time, prompts included; median over the repeats."""
    decode_tokens_per_second: float
    """The same without the prompts and first tokens."""
    spread: float
    """(slowest to fastest repeat) / median of tokens_per_second."""
    speedup_vs_ar: float | None
    """Median over repeats of the ratio to ar in the same repeat; None without ar in the run."""
    mean_acceptance_length: float | None
    """None for a method that drafts nothing."""
    roofline_share: float
    """Bytes that decoding must read, per second, over the bandwidth."""
    identical_to_ar: bool | None
    """Token for token on every prompt; None without ar in the run."""
    compile_seconds: float
    """Of the warm-up; in none of the speeds."""
    tokens: int


@dataclasses.dataclass(frozen=True)
class BenchResult:
    """All rows of one run and the bandwidth that they are shares of."""

    bandwidth: float
    """Bytes per second of all devices together, the best seen during the run."""
    rows: list[Row]


def bench(
    model: LanguageModel,
    methods: Sequence[Method],
    prompts: Sequence[AnyPrompt],
    *,
    batch_sizes: Sequence[int] = (1,),
    max_new_tokens: int = 128,
    sampling: Sampling = Sampling(),  # noqa: B008 (frozen)
    ignore_eos: bool = False,
    repeats: int = 3,
    progress: Callable[[str], None] = lambda _: None,
) -> BenchResult:
    """Runs every method at every batch size on the same prompts, `repeats` times.

    `progress` is called before each pass with what it is; there are
    len(batch_sizes) * len(methods) * (repeats + 1) passes.
    """
    bandwidth = memory_bandwidth()
    rows = []
    for batch_size in batch_sizes:

        def decode(method: Method, what: str, size: int = batch_size) -> list[Completion]:
            progress(f"{method.name}, batch {size}, {what}")
            return generate(
                model,
                method,
                list(prompts),
                sampling=sampling,
                max_new_tokens=max_new_tokens,
                batch_size=size,
                ignore_eos=ignore_eos,
            )

        warm = {m.name: decode(m, "warm-up") for m in methods}
        runs: dict[str, list[list[Completion]]] = {m.name: [] for m in methods}
        for repeat in range(repeats):
            for method in methods:
                runs[method.name].append(decode(method, f"run {repeat + 1}/{repeats}"))
            bandwidth = max(bandwidth, memory_bandwidth())
        rows += [
            _row(model, m.name, batch_size, runs, total(_metrics(warm[m.name]), batch_size))
            for m in methods
        ]
    # Simulated CPU devices share one memory; others bring their own.
    if model.mesh is not None and jax.default_backend() != "cpu":
        bandwidth *= model.mesh.size
    return BenchResult(bandwidth, [_with_bandwidth(row, bandwidth) for row in rows])


def to_json(result: BenchResult) -> dict[str, Any]:
    """The result as JSON-ready values, bandwidth in GB/s."""
    return {
        "bandwidth_gb_s": round(result.bandwidth / 1e9, 2),
        "rows": [
            {
                k: round(v, 4) if isinstance(v, float) else v
                for k, v in dataclasses.asdict(r).items()
            }
            for r in result.rows
        ],
    }


def _row(
    model: LanguageModel,
    name: str,
    batch_size: int,
    runs: dict[str, list[list[Completion]]],
    warm: Metrics,
) -> Row:
    totals = [total(_metrics(run), batch_size) for run in runs[name]]
    speeds = [m.tokens_per_second for m in totals]
    speed = statistics.median(speeds)
    decode = statistics.median(_decode_rate(run, batch_size) for run in runs[name])
    speedup, identical = None, None
    if BASELINE in runs:
        base = [total(_metrics(run), batch_size).tokens_per_second for run in runs[BASELINE]]
        speedup = statistics.median(a / b for a, b in zip(speeds, base, strict=True))
        identical = _tokens(runs[name][0]) == _tokens(runs[BASELINE][0])
    return Row(
        method=name,
        batch_size=batch_size,
        tokens_per_second=speed,
        decode_tokens_per_second=decode,
        spread=(max(speeds) - min(speeds)) / speed,
        speedup_vs_ar=speedup,
        mean_acceptance_length=None,
        roofline_share=_bytes_per_second(model, runs[name], batch_size),
        identical_to_ar=identical,
        compile_seconds=warm.compile_seconds,
        tokens=totals[0].tokens,
    )


def _with_bandwidth(row: Row, bandwidth: float) -> Row:
    return dataclasses.replace(row, roofline_share=row.roofline_share / bandwidth)


def _bytes_per_second(
    model: LanguageModel, runs: Sequence[list[Completion]], batch_size: int
) -> float:
    """Bytes that one-token steps must read, over the decode time; median over the repeats."""
    rates = []
    for run in runs:
        read, seconds = 0.0, 0.0
        for first in range(0, len(run), batch_size):
            batch = run[first : first + batch_size]
            steps = max(len(c.token_ids) for c in batch) - 1
            length = statistics.mean(c.prompt_tokens + len(c.token_ids) / 2 for c in batch)
            step = weight_bytes(model.params) + cache_bytes(model.params, len(batch), length)
            read += steps * step
            seconds += _decode_seconds(batch)
        rates.append(read / seconds if seconds > 0 else 0.0)
    return statistics.median(rates)


def _decode_rate(run: list[Completion], batch_size: int) -> float:
    batches = [run[i : i + batch_size] for i in range(0, len(run), batch_size)]
    seconds = sum(_decode_seconds(batch) for batch in batches)
    tokens = sum(len(c.token_ids) - 1 for c in run)
    return tokens / seconds if seconds > 0 else 0.0


def _decode_seconds(batch: Sequence[Completion]) -> float:
    return max(c.metrics.seconds - c.metrics.prompt_seconds for c in batch)


def _metrics(run: list[Completion]) -> list[Metrics]:
    return [completion.metrics for completion in run]


def _tokens(run: list[Completion]) -> list[tuple[int, ...]]:
    return [completion.token_ids for completion in run]
