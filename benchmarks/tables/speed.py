"""How fast things are."""

from __future__ import annotations

from benchmarks.tables.results import result_of, table


def layouts() -> str:
    """Milliseconds by dtype, layout, options and rows."""
    result = result_of("cpu-layouts")
    counts = sorted({row["rows"] for row in result["rows"]})
    lines: dict[tuple[str, ...], list[str]] = {}
    for row in result["rows"]:
        # Results from before there was a choice do not say it.
        key = (row.get("dtype", "float32"), row["layout"], row["options"])
        lines.setdefault(key, []).append(f"{row['ms']:.1f}")
    head = ["dtype", "layout", "options", *(f"{n} row{'s' if n > 1 else ''}" for n in counts)]
    return table(head, ([*key, *cells] for key, cells in lines.items()))


def peers() -> str:
    """Other engines beside this one."""
    head = ["engine", "version", "tokens/s", "mtd-jax is", "tokens"]
    rows = []
    for row in result_of("cpu-peers")["rows"]:
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
    head = ["method", "batch", "tokens/s", "decode tokens/s", "vs ar", "mean acceptance length"]
    head += ["tokens a pass", "share of bandwidth", "same tokens as ar"]
    rows = []
    for row in result_of(name)["rows"]:
        length = row["mean_acceptance_length"]
        rows.append(
            [
                row["method"],
                str(row["batch_size"]),
                f"{row['tokens_per_second']:.1f}",
                f"{row['decode_tokens_per_second']:.1f}",
                f"{row['speedup_vs_ar']:.2f}x",
                "-" if length is None else f"{length:.2f}",
                f"{row['tokens_per_forward']:.2f}",
                f"{row['roofline_share']:.0%}",
                "all" if row["identical_to_ar"] else "NOT ALL",
            ]
        )
    return table(head, rows)


def categories(name: str) -> str:
    """Speed-ups by kind of prompt."""
    found = [row for row in result_of(name)["rows"] if row["by_category"]]
    kinds = list(found[0]["by_category"])
    rows = (
        [
            row["method"],
            str(row["batch_size"]),
            *(f"{row['by_category'][kind]['speedup_vs_ar']:.2f}x" for kind in kinds),
        ]
        for row in found
        if row["method"] != "ar"
    )
    return table(["method", "batch", *(kind.replace("_", " ") for kind in kinds)], rows)


def verify_cost() -> str:
    """A verifying step by its rows."""
    rows = result_of("cpu-verify-cost")["rows"]
    return table(
        ["rows", *(str(row["rows"]) for row in rows)],
        [
            ["ms", *(f"{row['ms']:.1f}" for row in rows)],
            ["times one row", *(f"{row['ratio']:.2f}x" for row in rows)],
        ],
    )


def lossless() -> str:
    """Drafting methods and plain decoding on many prompts."""
    head = ["method", "prompts", "tokens", "identical", "ties in rounding", "different"]
    rows = (
        [
            row["method"],
            *(str(row[k]) for k in ("prompts", "tokens", "identical", "ties", "failed")),
        ]
        for row in result_of("cpu-lossless")["rows"]
    )
    return table(head, rows)
