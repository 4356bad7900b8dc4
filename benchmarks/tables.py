"""Writes the tables of README.md and docs/ from benchmarks/results/.

    python benchmarks/tables.py

A table stands between `<!-- table NAME -->` and `<!-- end -->`; a test fails if a page and the
results disagree.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
PAGES = (
    ROOT / "README.md",
    *(
        ROOT / "docs" / f"{name}.md"
        for name in ("dmtd", "hidden_transfer", "medusa", "performance", "pods", "training")
    ),
)
_MARKED = re.compile(r"(<!-- table (\S+) -->\n).*?(<!-- end -->)", re.DOTALL)


def rendered(page: str) -> str:
    """The page with every marked table made anew."""
    return _MARKED.sub(lambda m: f"{m[1]}{TABLES[m[2]]()}{m[3]}", page)


def layouts() -> str:
    """Milliseconds by dtype, layout, options and rows."""
    result = _result("cpu-layouts")
    counts = sorted({row["rows"] for row in result["rows"]})
    lines: dict[tuple[str, ...], list[str]] = {}
    for row in result["rows"]:
        # Results from before there was a choice do not say it.
        key = (row.get("dtype", "float32"), row["layout"], row["options"])
        lines.setdefault(key, []).append(f"{row['ms']:.1f}")
    head = ["dtype", "layout", "options", *(f"{n} row{'s' if n > 1 else ''}" for n in counts)]
    return _markdown(head, ([*key, *cells] for key, cells in lines.items()))


def peers() -> str:
    """Other engines beside this one."""
    head = ["engine", "version", "tokens/s", "mtd-jax is", "tokens"]
    rows = []
    for row in _result("cpu-peers")["rows"]:
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
    return _markdown(head, rows)


def autoregressive() -> str:
    """`mtd bench` of the baseline."""
    head = ["batch", "tokens/s", "decode tokens/s", "share of bandwidth", "spread"]
    return _markdown(
        head,
        (
            [
                str(row["batch_size"]),
                f"{row['tokens_per_second']:.1f}",
                f"{row['decode_tokens_per_second']:.1f}",
                f"{row['roofline_share']:.0%}",
                f"{row['spread']:.0%}",
            ]
            for row in _result("cpu-ar")["rows"]
        ),
    )


def first_token() -> str:
    """Time to the first text of `mtd generate`."""
    head = ["", "seconds"]
    result = _result("cpu-first-token")
    rows = [["first run (compiles)", f"{result['first_run']:.1f}"]]
    rows += [[f"warm cache, median of {len(result['seconds'])}", f"{result['median']:.1f}"]]
    return _markdown(head, rows)


def _drafting(name: str) -> str:
    """Drafting methods beside plain decoding."""
    head = ["method", "batch", "tokens/s", "decode tokens/s", "vs ar", "mean acceptance length"]
    head += ["tokens a pass", "share of bandwidth", "same tokens as ar"]
    rows = []
    for row in _result(name)["rows"]:
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
    return _markdown(head, rows)


def categories() -> str:
    """Speed-ups by kind of prompt."""
    found = [row for row in _result("cpu-speculative")["rows"] if row["by_category"]]
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
    return _markdown(["method", "batch", *(kind.replace("_", " ") for kind in kinds)], rows)


def verify_cost() -> str:
    """A verifying step by its rows."""
    rows = _result("cpu-verify-cost")["rows"]
    return _markdown(
        ["rows", *(str(row["rows"]) for row in rows)],
        [
            ["ms", *(f"{row['ms']:.1f}" for row in rows)],
            ["times one row", *(f"{row['ratio']:.2f}x" for row in rows)],
        ],
    )


def pods() -> str:
    """Training steps compiled for TPU pods that were not there."""
    head = ["model", "pod", "mesh", "GiB of HBM", "fits", "TFLOP", "of them the model's"]
    head += ["HBM GB", "sent GB", "largest gather", "ms", "MFU", "MFU if all overlaps"]
    rows = []
    for run in _result("pods")["runs"]:
        row = run["programs"][0]
        cells = [*_pod(run), *_fit(run, row)]
        if row["fits"]:
            overlapped = row["mfu"] * row["seconds"]["step"] / row["seconds"]["overlapped"]
            cells += [f"{row['flops'] / 1e12:.3g}", f"{row['model_flops'] / 1e12:.3g}"]
            cells += [f"{row['hbm_traffic'] / 1e9:.1f}", f"{row['sent'] / 1e9:.1f}"]
            cells += [f"{row['largest_gather'] / run['parameter_bytes']:.1%} of the weights"]
            cells += [f"{1e3 * row['seconds']['step']:.1f}"]
            cells += [f"{row['mfu']:.1%}", f"{overlapped:.1%}"]
        rows.append(cells + ["-"] * (len(head) - len(cells)))
    return _markdown(head, rows)


def pods_decoding() -> str:
    """Decode loops compiled for them."""
    head = ["model", "pod", "program", "rows x slots", "mesh", "GiB of HBM", "fits"]
    head += ["HBM GB", "sent GB", "ms"]
    rows = []
    for run in _result("pods")["runs"]:
        for row in run["programs"][1:]:
            size = f"{run['decode_batch']} x {run['decode_length']}"
            cells = [*_pod(run), row["name"], size, *_fit(run, row)]
            if row["fits"]:
                cells += [f"{row['hbm_traffic'] / 1e9:.1f}", f"{row['sent'] / 1e9:.2f}"]
                cells += [f"{1e3 * row['seconds']['step']:.1f}"]
            rows.append(cells + ["-"] * (len(head) - len(cells)))
    return _markdown(head, rows)


def _pod(run: dict[str, Any]) -> list[str]:
    return [run["model"], f"{run['devices']} {run['chip']['name']} ({run['topology']})"]


def _fit(run: dict[str, Any], row: dict[str, Any]) -> list[str]:
    mesh = " x ".join(f"{axis} {size}" for axis, size in row["mesh"].items() if size > 1)
    memory = f"{row['bytes'] / 2**30:.1f} of {run['chip']['hbm'] / 2**30:.0f}"
    return [mesh, memory, "yes" if row["fits"] else "NO"]


def lossless() -> str:
    """Drafting methods and plain decoding on many prompts."""
    head = ["method", "prompts", "tokens", "identical", "ties in rounding", "different"]
    rows = (
        [
            row["method"],
            *(str(row[k]) for k in ("prompts", "tokens", "identical", "ties", "failed")),
        ]
        for row in _result("cpu-lossless")["rows"]
    )
    return _markdown(head, rows)


def fine_tuning() -> str:
    """Held-out loss by step."""
    head = ["steps", "held-out loss", "held-out accuracy", "answers as before training"]
    rows = (
        [
            str(row["step"]),
            f"{row['held_out_loss']:.3f}",
            f"{row['held_out_accuracy']:.1%}",
            f"{row['held_out_decoded_as_before']:.0%}",
        ]
        for row in _result("cpu-sft")["held_out"]
    )
    return _markdown(head, rows)


def cycles_speed() -> str:
    """DMTD beside plain decoding: speed-ups, and which share they are of the bound by bytes."""
    rows = _result("cpu-dmtd-speed")["rows"]
    sizes = sorted({row["batch_size"] for row in rows})
    plain = {row["batch_size"]: row for row in rows if row["method"] == "ar"}
    lines = [["ar: share of bandwidth", *(f"{plain[n]['roofline_share']:.0%}" for n in sizes)]]
    for method in dict.fromkeys(row["method"] for row in rows if row["method"] != "ar"):
        cells = []
        for row in (
            r for n in sizes for r in rows if (r["method"], r["batch_size"]) == (method, n)
        ):
            bytes_read = plain[row["batch_size"]]["bytes_read_per_token"]
            bound = bytes_read / row["bytes_read_per_token"]
            cells.append(f"{row['speedup_vs_ar']:.2f}x ({row['speedup_vs_ar'] / bound:.0%})")
        lines.append([method.replace("dmtd:cycle=", "τ = "), *cells])
    return _markdown(["batch", *map(str, sizes)], lines)


_FINE_TUNED = {"sft": "cpu-sft"} | {f"τ = {n}": f"cpu-dmtd-cycle{n}" for n in (2, 3, 4)}


def cycles_quality() -> str:
    """Held-out loss by step, with and without cycles, and the share of accuracy that is kept."""
    runs = {
        label: {line["step"]: line for line in _result(name)["held_out"]}
        for label, name in _FINE_TUNED.items()
    }
    lines = []
    for step, reference in runs["sft"].items():
        cells = [f"{reference['held_out_loss']:.3f}"]
        for label in list(runs)[1:]:
            line = runs[label].get(step)
            if line is None:
                cells.append("-")
                continue
            kept = line["held_out_accuracy"] / reference["held_out_accuracy"]
            cells.append(f"{line['held_out_loss']:.3f} ({kept:.0%})")
        tokens = step * _result("cpu-sft")["tokens"] / _result("cpu-sft")["steps"]
        lines.append([str(step), f"{tokens / 1000:.0f}", *cells])
    return _markdown(["steps", "thousand tokens", *runs], lines)


def samples() -> str:
    """Answers to the same prompts, shortened."""
    result = _result("cpu-dmtd-samples")["rows"]
    names = list(result[0]["answers"])
    rows = ([_cell(row["prompt"]), *(_cell(row["answers"][n]) for n in names)] for row in result)
    return _markdown(["prompt", *names], rows)


def cycles_tasks() -> str:
    """Shares of right answers to tasks of lm-eval."""
    rows = _result("cpu-dmtd-tasks")["rows"]
    names = [(task, name) for task, found in rows[0]["tasks"].items() for name in found]
    head = ["", *(f"{task}, {name.removesuffix(',none')}" for task, name in names)]
    cells = ([row["label"], *(f"{row['tasks'][t][n]:.2f}" for t, n in names)] for row in rows)
    return _markdown(head, cells)


def _cell(text: str, limit: int = 300) -> str:
    text = " ".join(text.split()).replace("|", "\\|")
    return text if len(text) <= limit else f"{text[:limit].rsplit(' ', 1)[0]} ..."


def corpus() -> str:
    """Documents and tokens by kind of text."""
    result = _result("corpus")
    kinds: dict[str, list[dict[str, Any]]] = {}
    for source in result["sources"].values():
        kinds.setdefault(source["kind"], []).append(source)
    sums = {kind: _sums(parts) for kind, parts in kinds.items()}
    rows = [[kind, *cells] for kind, cells in sums.items()]
    rows.append(["all", *_sums([result["total"]])])
    return _markdown(["", "tokens", "documents", "held out", "prompts"], rows)


def _sums(parts: list[dict[str, Any]]) -> list[str]:
    names = ("tokens", "train_documents", "held_out_documents", "prompts")
    return [f"{sum(part.get(name, 0) for part in parts):,}" for name in names]


def cycles_places() -> str:
    """Held-out loss of what each place in a cycle predicts, at the last step of each run."""
    head = [
        "",
        "steps",
        "first token of an answer",
        "head",
        *(f"late only, {n}" for n in (2, 3, 4)),
    ]
    lines = []
    for label, name in list(_FINE_TUNED.items())[1:]:
        last = _result(name)["held_out"][-1]
        keys = ["held_out_loss_plain", *(f"held_out_loss_{n}" for n in (1, 2, 3, 4))]
        cells = [f"{last[key]:.3f}" if key in last else "-" for key in keys]
        lines.append([label, str(last["step"]), *cells])
    return _markdown(head, lines)


def heads_accuracy() -> str:
    """How often guesses of the shipped heads are the base's own token, on held-out answers."""
    head = ["heads", "place", "best guess", "among the best 2", "3", "4", "5"]
    rows = []
    for path in sorted((ROOT / "mtd_jax" / "heads").glob("*/method.json")):
        told = json.loads(path.read_text(encoding="utf-8"))
        record = told["record"]
        for i, ranks in enumerate(record["accuracies"], start=1):
            among = [f"{sum(ranks[: n + 1]):.1%}" for n in range(5)]
            rows.append([told["method"], f"n + {i + 1}", *among])
    return _markdown(head, rows)


def transfer_layers() -> str:
    """Hidden Transfer's guesses by the layer of its maps."""
    result = _result("cpu-transfer-layers")
    steps = range(len(result["rows"][0]["top1"]))
    head = ["layer", *(f"step {i + 1}" for i in steps), "tokens a pass"]
    rows = (
        [
            str(row["layer"]),
            *(f"{row['top1'][i]:.1%}" for i in steps),
            f"{row['tokens_a_pass']:.2f}",
        ]
        for row in result["rows"]
    )
    return _markdown(head, rows)


TABLES: dict[str, Callable[[], str]] = {
    "heads-accuracy": heads_accuracy,
    "cpu-transfer-layers": transfer_layers,
    "corpus": corpus,
    "cpu-dmtd-tasks": cycles_tasks,
    "cpu-layouts": layouts,
    "cpu-peers": peers,
    "cpu-ar": autoregressive,
    "cpu-first-token": first_token,
    "cpu-speculative": lambda: _drafting("cpu-speculative"),
    "cpu-self-speculative": lambda: _drafting("cpu-self-speculative"),
    "cpu-speculative-categories": categories,
    "cpu-code-editing": lambda: _drafting("cpu-code-editing"),
    "cpu-lossless": lossless,
    "cpu-sft": fine_tuning,
    "cpu-dmtd-speed": cycles_speed,
    "cpu-dmtd-quality": cycles_quality,
    "cpu-dmtd-places": cycles_places,
    "cpu-dmtd-samples": samples,
    "cpu-verify-cost": verify_cost,
    "pods": pods,
    "pods-decoding": pods_decoding,
}


def _result(name: str) -> dict[str, Any]:
    path = ROOT / "benchmarks" / "results" / f"{name}.json"
    return dict(json.loads(path.read_text(encoding="utf-8")))


def _markdown(head: list[str], rows: Iterable[list[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def main() -> None:
    """Rewrites the pages."""
    for page in PAGES:
        page.write_text(rendered(page.read_text(encoding="utf-8")), encoding="utf-8")


if __name__ == "__main__":
    main()
