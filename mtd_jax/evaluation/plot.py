"""Pictures of measurements; needs the `plot` extra."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mtd_jax.errors import InputError


def check_drawable(path: Path) -> None:
    """Refuses to go on where nothing can be drawn: before a long measurement, not behind it.

    Raises:
      InputError: matplotlib is not installed, or does not know the file's ending.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise InputError("plots need matplotlib: pip install 'mtd-jax[plot]'") from None
    known = Figure().canvas.get_supported_filetypes()
    if path.suffix.lstrip(".") not in known:
        raise InputError(
            f"cannot draw {path}: its ending must be one of {', '.join(sorted(known))}"
        )


def plot_bench(rows: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Speed-up by batch size, and how many drafts the steps accepted; `rows` as in bench's JSON."""
    from matplotlib.figure import Figure

    drafting = [row for row in rows if sum(row["acceptance_histogram"])]
    figure = Figure(figsize=(11, 4.2), layout="constrained")
    left, right = figure.subplots(1, 2)
    sizes = sorted({row["batch_size"] for row in rows})
    if len(sizes) == 1:
        _draw_bars(left, rows)
    else:
        _draw_curves(left, rows, sizes)

    smallest = [row for row in drafting if row["batch_size"] == sizes[0]]
    width = 0.8 / max(len(smallest), 1)
    for i, row in enumerate(smallest):
        steps = sum(row["acceptance_histogram"])
        shares = [count / steps for count in row["acceptance_histogram"]]
        right.bar([x + i * width for x in range(len(shares))], shares, width, label=_label(row))
    right.set(
        title=f"drafts accepted a step (batch {sizes[0]})",
        xlabel="accepted drafts",
        ylabel="share of steps with drafts",
    )
    if smallest:
        right.legend()
    _save(figure, path)


def _draw_bars(axes: Any, rows: Sequence[Mapping[str, Any]]) -> None:
    """Speed-ups at the one batch size there is, the first method on top."""
    known = [row for row in reversed(rows) if row["speedup_vs_ar"] is not None]
    bars = axes.barh([_label(row) for row in known], [row["speedup_vs_ar"] for row in known])
    axes.bar_label(bars, fmt="%.2fx", padding=3)
    axes.axvline(1.0, color="grey", linewidth=0.8, linestyle=":")
    axes.set(title=f"speed-up over ar (batch {rows[0]['batch_size']})", xlabel="x")
    axes.margins(x=0.12)


def _draw_curves(axes: Any, rows: Sequence[Mapping[str, Any]], sizes: Sequence[int]) -> None:
    for method in dict.fromkeys(row["method"] for row in rows):
        mine = {r["batch_size"]: r["speedup_vs_ar"] for r in rows if r["method"] == method}
        known = [size for size in sizes if mine.get(size) is not None]
        label = next(_label(row) for row in rows if row["method"] == method)
        places = [sizes.index(size) for size in known]
        axes.plot(places, [mine[size] for size in known], marker="o", label=label)
    axes.axhline(1.0, color="grey", linewidth=0.8, linestyle=":")
    axes.set(title="speed-up over ar", xlabel="batch size", ylabel="x", ylim=(0, None))
    axes.set_xticks(range(len(sizes)), [str(size) for size in sizes])
    axes.legend()


def _label(row: Mapping[str, Any]) -> str:
    return str(row["method"]) if row["lossless"] else f"{row['method']} (lossy)"


def plot_step_cost(curves: Mapping[str, Mapping[int, float]], path: Path) -> None:
    """Cost of a verifying step by its rows, one row being 1, a curve for each label."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.5, 4.2), layout="constrained")
    axes = figure.subplots()
    for label, costs in curves.items():
        axes.plot(list(costs), list(costs.values()), marker="o", label=label)
    axes.set(
        title="cost of a verifying step", xlabel="rows", ylabel="times one row", ylim=(0, None)
    )
    axes.set_xscale("log", base=2)
    ticks = sorted({rows for costs in curves.values() for rows in costs})
    axes.set_xticks(ticks, [str(t) for t in ticks])
    axes.grid(alpha=0.3)
    axes.legend()
    _save(figure, path)


def plot_losses(lines: Sequence[Mapping[str, float]], path: Path) -> bool:
    """Loss by step and held-out loss of a training run, from the lines of its log.

    Returns False, and draws nothing, where matplotlib is not installed.
    """
    figure, axes = _axes()
    if axes is None:
        return False
    for name, style in (("loss", "-"), ("held_out_loss", "o-")):
        known = [(line["step"], line[name]) for line in lines if name in line]
        if known:
            axes.plot(*zip(*known, strict=True), style, label=name, markersize=4)
    axes.set(title="training", xlabel="steps", ylabel="loss, nats a token")
    axes.grid(alpha=0.3)
    axes.legend()
    _save(figure, path)
    return True


def plot_sweep(rows: Sequence[Mapping[str, Any]], path: Path) -> bool:
    """Accuracy of each step's first guess by transfer layer; `rows` as in the JSON of `mtd sweep`.

    Returns False, and draws nothing, where matplotlib is not installed.
    """
    figure, axes = _axes()
    if axes is None:
        return False
    layers = [row["layer"] for row in rows]
    for step in range(len(rows[0]["top1"])):
        axes.plot(layers, [row["top1"][step] for row in rows], "o-", label=f"step {step + 1}")
    axes.set(
        title="first guess right, held-out texts",
        xlabel="transfer layer",
        ylabel="share",
        ylim=(0, None),
    )
    axes.grid(alpha=0.3)
    axes.legend()
    _save(figure, path)
    return True


def plot_similarity(rows: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Cosine of pseudo and real rows by layer; `rows` of `benchmarks/transfer_rows.py`."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.5, 4.2), layout="constrained")
    axes = figure.subplots()
    for step in range(len(rows[0]["cosine"])):
        known = [r for r in rows if r["cosine"][step] is not None]
        values = [r["cosine"][step] for r in known]
        axes.plot([r["layer"] for r in known], values, "o-", label=f"step {step + 1}", markersize=4)
    axes.set(
        title="pseudo and real rows, held-out texts",
        xlabel="layers passed",
        ylabel="mean cosine",
        ylim=(0, 1),
    )
    axes.grid(alpha=0.3)
    axes.legend()
    _save(figure, path)


def plot_ranks(rows: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Joint loss and acceptance by rank, a point a seed; `rows` of `benchmarks/cp_ranks.py`."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 4.2), layout="constrained")
    shown = ("joint", "held-out joint loss, nats"), ("mean_acceptance_length", "tokens a step")
    for axes, (name, label) in zip(figure.subplots(1, 2), shown, strict=True):
        for seed in sorted({row["seed"] for row in rows}):
            known = sorted((row["rank"], row[name]) for row in rows if row["seed"] == seed)
            axes.plot(*zip(*known, strict=True), "o-", label=f"seed {seed}", markersize=4)
        axes.set_xscale("log", base=2)
        axes.set(xlabel="rank", ylabel=label)
        axes.grid(alpha=0.3)
        axes.legend()
    _save(figure, path)


def _axes() -> tuple[Any, Any]:
    """A figure with one diagram; None where matplotlib is not installed."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return None, None
    figure = Figure(figsize=(6.5, 4.2), layout="constrained")
    return figure, figure.subplots()


def _save(figure: Any, path: Path) -> None:
    try:
        figure.savefig(path, dpi=150)
    except (OSError, ValueError) as error:
        raise InputError(f"cannot write {path}: {error}") from None
