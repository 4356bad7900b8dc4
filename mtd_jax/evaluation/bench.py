"""How fast the methods decode, measured beside each other in one run.

Machines drift by tens of percent within minutes, so no figure is compared with one from another
run: the methods take turns batch by batch, every speed-up is the median of ratios within a repeat,
and the bandwidth is measured between them.
"""

from __future__ import annotations

import dataclasses
import operator
import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax

from mtd_jax.decoding.generate import Completion, generate
from mtd_jax.decoding.language_model import LanguageModel
from mtd_jax.decoding.method import Method
from mtd_jax.decoding.metrics import Metrics, total
from mtd_jax.decoding.prompt import bucket_prompt
from mtd_jax.decoding.requests import AnyPrompt, Prompt, as_prompt, encode, without_cycles
from mtd_jax.decoding.sampling import Sampling
from mtd_jax.evaluation.roofline import memory_bandwidth

BASELINE = "ar"
_SLOWER = 0.98
"""Below this a method is called slower, unless a repeat says otherwise; in between, the machine's
noise decides."""

_DECODING = operator.attrgetter("decode_tokens_per_second")
_ALL = operator.attrgetter("tokens_per_second")

Runs = Mapping[str, list[list[Completion]]]
"""By method: its completions of all prompts, for every repeat."""


@dataclasses.dataclass(frozen=True)
class Row:
    """One method at one batch size."""

    method: str
    batch_size: int
    tokens_per_second: float
    """New tokens over all engine time, prompts included; median over the repeats."""
    decode_tokens_per_second: float
    """The same without the prompts and first tokens."""
    spread: float | None
    """(slowest to fastest repeat) / median of tokens_per_second."""
    speedup_vs_ar: float | None
    """Median over repeats of the ratio of decode seconds to ar's in the same repeat, token for
    token; None without ar in the run or where answers have one token."""
    speedup_range: tuple[float, float] | None
    """The least and the greatest of these ratios."""
    total_speedup_vs_ar: float | None
    """The same of all engine time, prompts included."""
    roofline_share: float
    """Bytes that decoding must read, per second, over the bandwidth."""
    identical_to_ar: bool | None
    """Token for token on every prompt of every repeat; None without ar in the run, and where
    answers differ that are drawn, or need not be the same: a method may draw otherwise from the
    same distribution."""
    lossless: bool
    """By the method's construction."""
    own_reference: bool
    """Whether it is lossless beside plain decoding of its own (`methods.reference`) and not beside
    ar, with which tokens are then not compared."""
    verdict: str
    """`faster`, `as fast`, `slower` than ar; empty without ar, or where nothing was decoded."""
    by_category: dict[str, dict[str, Any]]
    """Speed-ups and acceptance of the prompts of each category, where prompts have one."""
    requests: list[tuple[str, Metrics]]
    """Of the first repeat, each prompt alone, by its id."""
    compile_seconds: float
    """Of the warm-up; in none of the speeds."""
    metrics: Metrics
    """Of the first repeat, all prompts together."""


@dataclasses.dataclass(frozen=True)
class BenchResult:
    """All rows of one run and the bandwidth that they are shares of."""

    bandwidth: float
    """Bytes per second of all devices together, the best seen during the run."""
    rows: list[Row]


def bench(
    model: LanguageModel,
    methods: Mapping[str, Callable[[int], Method]],
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

    Args:
      methods: label -> the method for a batch size; `ar` is what the others are compared with.
      progress: is called before each piece of work with what it is, `passes(...)` times.
    """
    asked = [as_prompt(p, i) for i, p in enumerate(prompts)]
    length = _length_by(model)

    def reach(prompt: Prompt) -> tuple[int, int]:
        budget = max_new_tokens if prompt.max_new_tokens is None else prompt.max_new_tokens
        return length(prompt), length(prompt) + budget

    bandwidth = memory_bandwidth()
    rows = []
    for batch_size in batch_sizes:
        batches = _batches(asked, batch_size, length)
        known = [prompt for batch in batches for prompt in batch]
        made = {label: make(batch_size) for label, make in methods.items()}

        def decode(
            label: str,
            part: Sequence[Prompt],
            what: str,
            size: int = batch_size,
            made: dict[str, Method] = made,
            behind_eos: bool = ignore_eos,
        ) -> list[Completion]:
            progress(f"{label}, batch {size}, {what}")
            return generate(
                model,
                made[label],
                part if made[label].has_cycles else without_cycles(part),
                sampling=sampling,
                max_new_tokens=max_new_tokens,
                batch_size=size,
                ignore_eos=behind_eos,
            )

        few = [prompt for batch in _of_all_programs(batches, reach) for prompt in batch]
        warm = {label: decode(label, few, "warm-up", behind_eos=True) for label in made}
        runs: dict[str, list[list[Completion]]] = {label: [] for label in made}
        for repeat in range(repeats):
            for label in made:
                runs[label].append([])
            # What a method leaves behind in the caches is not always met by the same one.
            order = list(made) if repeat % 2 == 0 else list(reversed(made))
            for part in batches:
                for label in order:
                    runs[label][-1] += decode(label, part, f"run {repeat + 1}/{repeats}")
            bandwidth = max(bandwidth, memory_bandwidth())
        drawn = sampling.temperature > 0
        for label, method in made.items():
            compiled = total([c.metrics for c in warm[label]], batch_size).compile_seconds
            rows.append(_row(label, method, batch_size, runs, known, compiled, drawn))
    # Simulated CPU devices share one memory; others bring their own.
    if model.mesh is not None and jax.default_backend() != "cpu":
        bandwidth *= model.mesh.size
    return BenchResult(bandwidth, [_with_bandwidth(row, bandwidth) for row in rows])


def _length_by(model: LanguageModel) -> Callable[[Prompt], int]:
    """Counts a prompt's tokens."""

    def length(prompt: Prompt) -> int:
        task = encode(prompt, model.config, model.tokenizer, max_new_tokens=1, chat=None)
        return len(task.token_ids)

    return length


def _batches(
    prompts: Sequence[Prompt], size: int, length: Callable[[Prompt], int]
) -> list[list[Prompt]]:
    """Batches of one category as far as they fill, the short ones first; a part of one comes last.

    Caches of one size follow each other, so that a CPU, which can hold few programs
    (`backend.release_programs`), takes them from disk once and not for every prompt.
    """
    by_length = sorted(prompts, key=length)
    whole: list[list[Prompt]] = []
    rest: list[Prompt] = []
    for category in dict.fromkeys(prompt.category for prompt in by_length):
        alike = [prompt for prompt in by_length if prompt.category == category]
        full = len(alike) - len(alike) % size
        whole += [alike[i : i + size] for i in range(0, full, size)]
        rest += alike[full:]
    rest.sort(key=length)
    mixed = [rest[i : i + size] for i in range(0, len(rest), size)]
    last = [mixed.pop()] if mixed and len(mixed[-1]) < size else []
    return sorted(whole + mixed, key=lambda batch: max(map(length, batch))) + last


def _of_all_programs(
    batches: Sequence[list[Prompt]], reach: Callable[[Prompt], tuple[int, int]]
) -> list[list[Prompt]]:
    """The batch that goes farthest of every padded length, in their order.

    Decoded behind end tokens, these run every program, those that grow caches among them.

    Args:
      reach: a prompt's length, and that of its longest answer with it.
    """
    farthest: dict[int, tuple[int, int]] = {}
    for i, batch in enumerate(batches):
        lengths, ends = zip(*map(reach, batch), strict=True)
        padded = bucket_prompt(max(lengths))
        farthest[padded] = max(farthest.get(padded, (0, i)), (max(ends), i))
    return [batches[i] for i in sorted(i for _, i in farthest.values())]


def passes(methods: int, prompts: int, batch_sizes: Sequence[int], repeats: int) -> int:
    """How often `bench` calls its `progress`."""
    return sum(methods * (1 + repeats * -(-prompts // size)) for size in batch_sizes)


def to_json(result: BenchResult) -> dict[str, Any]:
    """The result as JSON-ready values, bandwidth in GB/s."""
    rows = []
    for row in result.rows:
        values = {f.name: getattr(row, f.name) for f in dataclasses.fields(row)}
        metrics = values.pop("metrics").to_dict()
        requests = [
            {"id": name} | one.to_dict(result.bandwidth) for name, one in values.pop("requests")
        ]
        for name in ("tokens_per_second", "decode_tokens_per_second", "compile_seconds"):
            del metrics[name]  # the row has medians of them
        rows.append(jax.tree.map(_rounded, values) | {"requests": requests} | metrics)
    return {"bandwidth_gb_s": round(result.bandwidth / 1e9, 2), "rows": rows}


def speedup_text(median: float | None, span: Sequence[float] | None) -> str:
    """`1.39x`, with the range of the repeats where it can be seen: `1.39x (1.35-1.42)`."""
    if median is None:
        return "-"
    low, high = (f"{ratio:.2f}" for ratio in span or (median, median))
    return f"{median:.2f}x" + ("" if low == high else f" ({low}-{high})")


def _row(
    label: str,
    method: Method,
    batch_size: int,
    runs: Runs,
    prompts: Sequence[Prompt],
    compile_seconds: float,
    drawn: bool,
) -> Row:
    totals = [total([c.metrics for c in run], batch_size) for run in runs[label]]
    speeds = [m.tokens_per_second for m in totals]
    speed = statistics.median(speeds)
    identical = None
    verdict = ""
    ratios = _ratios(runs, label, batch_size, _DECODING)
    speedup = _median(ratios)
    if BASELINE in runs:
        pairs = zip(runs[label], runs[BASELINE], strict=True)
        identical = all(_tokens(mine) == _tokens(base) for mine, base in pairs)
        differs_by_right = drawn or method.plain() is not None
        identical = None if differs_by_right and not identical else identical
        verdict = _verdict(ratios)
    return Row(
        method=label,
        batch_size=batch_size,
        tokens_per_second=speed,
        decode_tokens_per_second=statistics.median(m.decode_tokens_per_second for m in totals),
        spread=(max(speeds) - min(speeds)) / speed if len(speeds) > 1 else None,
        speedup_vs_ar=speedup,
        speedup_range=_range(ratios),
        total_speedup_vs_ar=_median(_ratios(runs, label, batch_size, _ALL)),
        roofline_share=statistics.median(_ratio(m.bytes_read, m.decode_seconds) for m in totals),
        identical_to_ar=identical,
        lossless=method.lossless,
        own_reference=method.plain() is not None,
        verdict=verdict,
        by_category=_by_category(runs, label, batch_size, prompts),
        requests=[(c.id, c.metrics) for c in runs[label][0]],
        compile_seconds=compile_seconds,
        metrics=totals[0],
    )


def _by_category(
    runs: Runs, label: str, batch_size: int, prompts: Sequence[Prompt]
) -> dict[str, dict[str, Any]]:
    """Whole batches only: one of mixed categories belongs to none."""
    batches = [
        range(i, min(i + batch_size, len(prompts))) for i in range(0, len(prompts), batch_size)
    ]
    found: dict[str, list[int]] = {}
    for batch in batches:
        categories = {prompts[i].category for i in batch}
        category = categories.pop()
        if category is not None and not categories:
            found.setdefault(category, []).extend(batch)
    report = {}
    for category, chosen in sorted(found.items()):
        part = {m: [[run[i] for i in chosen] for run in rs] for m, rs in runs.items()}
        metrics = total([c.metrics for c in part[label][0]], batch_size)
        ratios = _ratios(part, label, batch_size, _DECODING)
        report[category] = {
            "prompts": len(chosen),
            "speedup_vs_ar": _median(ratios),
            "speedup_range": _range(ratios),
            "mean_acceptance_length": metrics.mean_acceptance_length,
            "tokens_per_forward": _ratio(metrics.tokens, metrics.forwards),
        }
    return report


def _ratios(
    runs: Runs, label: str, batch_size: int, rate: Callable[[Metrics], float]
) -> list[float]:
    """A rate over that of ar in the same repeat, of every repeat; empty without ar.

    Repeats in which nothing was decoded are left out: answers of one token come with the prompt.
    """
    ratios = []
    for mine, base in zip(runs[label], runs.get(BASELINE, []), strict=False):
        ours, theirs = (rate(total([c.metrics for c in run], batch_size)) for run in (mine, base))
        if min(ours, theirs) > 0:
            ratios.append(ours / theirs)
    return ratios


def _verdict(ratios: Sequence[float]) -> str:
    """The median's, where all repeats are on its side of 1."""
    if not ratios:
        return ""
    speedup = statistics.median(ratios)
    if speedup < _SLOWER and max(ratios) < 1:
        return "slower"
    return "faster" if speedup > 1 / _SLOWER and min(ratios) > 1 else "as fast"


def _median(values: Sequence[float]) -> float | None:
    return statistics.median(values) if values else None


def _range(values: Sequence[float]) -> tuple[float, float] | None:
    return (min(values), max(values)) if len(values) > 1 else None


def _rounded(value: Any) -> Any:
    return round(value, 4) if isinstance(value, float) else value


def _ratio(amount: float, parts: float) -> float:
    return amount / parts if parts > 0 else 0.0


def _with_bandwidth(row: Row, bandwidth: float) -> Row:
    return dataclasses.replace(row, roofline_share=row.roofline_share / bandwidth)


def _tokens(run: list[Completion]) -> list[tuple[int, ...]]:
    return [completion.token_ids for completion in run]
