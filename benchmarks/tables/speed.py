"""How fast things are."""

from __future__ import annotations

from typing import Any

from benchmarks.tables.results import result_of, table
from mtd_jax.evaluation.bench import speedup_text


def layouts(name: str) -> str:
    """Milliseconds by dtype, layout, options and rows."""
    result = result_of(name)
    counts = sorted({row["rows"] for row in result["rows"]})
    lines: dict[tuple[str, ...], dict[int, str]] = {}
    for row in result["rows"]:
        # Results from before there was a choice do not say it.
        key = (row.get("dtype", "float32"), row["layout"], row["options"])
        lines.setdefault(key, {})[row["rows"]] = f"{row['ms']:.1f}"
    head = ["dtype", "layout", "options", *(f"{n} row{'s' if n > 1 else ''}" for n in counts)]
    cells = ([*key, *(found.get(n, "-") for n in counts)] for key, found in lines.items())
    return table(head, cells)


def peers() -> str:
    """Other engines beside this one."""
    head = ["engine", "version", "tokens/s", "mtd-jax is", "tokens"]
    rows = []
    result = result_of("cpu-peers")
    for row in result["rows"]:
        first = row["first_different_token"]
        rows.append(
            [
                row["peer"],
                row["version"],
                f"{row['median']:.1f}",
                f"{row['mtd_jax_over_peer']:.2f}x",
                "identical" if first is None else f"differ from {first}",
            ]
        )
    rows += [[name, "-", "-", "-", why] for name, why in result["skipped"].items()]
    return table(head, rows)


def autoregressive() -> str:
    """`mtd bench` of the baseline."""
    head = ["batch", "tokens/s", "decode tokens/s", "share of bandwidth", "spread"]
    return table(
        head,
        (
            [
                str(row["batch_size"]),
                f"{row['tokens_per_second']:.1f}",
                f"{row['decode_tokens_per_second']:.1f}",
                f"{row['roofline_share']:.0%}",
                f"{row['spread']:.0%}",
            ]
            for row in result_of("cpu-ar")["rows"]
        ),
    )


def first_token() -> str:
    """Time to the first text of `mtd generate`."""
    head = ["", "seconds"]
    result = result_of("cpu-first-token")
    rows = [["first run (compiles)", f"{result['first_run']:.1f}"]]
    rows += [[f"warm cache, median of {len(result['seconds'])}", f"{result['median']:.1f}"]]
    return table(head, rows)


def drafting(name: str) -> str:
    """Drafting methods beside plain decoding."""
    head = ["method", "batch", "tokens/s", "decode tokens/s", "vs ar", "with prompts"]
    rows = []
    for row in result_of(name)["rows"]:
        # Results of before do not say speed-ups with the prompts' time.
        total = row.get("total_speedup_vs_ar")
        speeds = [f"{row[key]:.1f}" for key in ("tokens_per_second", "decode_tokens_per_second")]
        cells = [row["method"], str(row["batch_size"]), *speeds, _speedup(row)]
        rows.append([*cells, speedup_text(total, None), *_drafts(row)])
    return table([*head, *_DRAFTS], rows)


def gains(name: str, batch_size: int) -> str:
    """Methods over plain decoding at one batch size: all prompts, and by kind."""
    found, names = _by_kind(name, batch_size)
    rows = []
    for row in found:
        ratios = [row["by_category"][kind]["speedup_vs_ar"] for kind in names]
        shown = [speedup_text(ratio, None) for ratio in ratios]
        rows.append([row["method"], _speedup(row), *shown, *_drafts(row)])
    return table(["method", "vs ar", *names.values(), *_DRAFTS], rows)


def kinds(name: str, batch_size: int) -> str:
    """The speed-ups over all prompts and by kind, with the ranges of their repeats."""
    found, names = _by_kind(name, batch_size)
    rows = (
        [row["method"], _speedup(row), *(_speedup(row["by_category"][kind]) for kind in names)]
        for row in found
        if row["method"] != "ar"
    )
    return table(["method", "all", *names.values()], rows)


def _by_kind(name: str, batch_size: int) -> tuple[list[dict[str, Any]], dict[str, str]]:
    """Rows of one batch size, and kinds of prompts with their headings."""
    found = [row for row in result_of(name)["rows"] if row["batch_size"] == batch_size]
    return found, {kind: kind.replace("_", " ") for kind in found[0]["by_category"]}


_DRAFTS = ["mean acceptance length", "tokens a pass", "share of bandwidth", "same tokens as ar"]


def _drafts(row: dict[str, Any]) -> list[str]:
    """The cells of `_DRAFTS`."""
    length = row["mean_acceptance_length"]
    return [
        "-" if length is None else f"{length:.2f}",
        f"{row['tokens_per_forward']:.2f}",
        f"{row['roofline_share']:.0%}",
        {True: "all", False: "NOT ALL", None: "drawn"}[row["identical_to_ar"]],
    ]


def _speedup(row: dict[str, Any]) -> str:
    return speedup_text(row["speedup_vs_ar"], row.get("speedup_range"))


def verify_cost() -> str:
    """A verifying step by its rows and by what multiplies them."""
    found = result_of("cpu-verify-cost")["rows"]
    counts = sorted({row["rows"] for row in found})
    lines = []
    for products in ("few_rows", "xla"):
        rows = {row["rows"]: row for row in found if row["products"] == products}
        lines.append([products, "ms", *(f"{rows[n]['ms']:.1f}" for n in counts)])
        lines.append(["", "times one row", *(f"{rows[n]['ratio']:.2f}x" for n in counts)])
    return table(["products", "rows", *map(str, counts)], lines)


def lossless() -> str:
    """Drafting methods and plain decoding on many prompts."""
    head = ["method", "prompts", "tokens", "drafted", "accepted"]
    head += ["identical", "ties in rounding", "different"]
    rows = (
        [
            row["method"],
            *(str(row[k]) for k in ("prompts", "tokens", "num_draft_tokens")),
            str(row["num_accepted_draft_tokens"]),
            *(str(row[k]) for k in ("identical", "ties", "failed")),
        ]
        for row in result_of("cpu-lossless")["rows"]
    )
    return table(head, rows)
