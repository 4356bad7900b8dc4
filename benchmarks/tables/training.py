"""What training made of models, and of which texts."""

from __future__ import annotations

from typing import Any

from benchmarks.tables.results import result_of, table

_FINE_TUNED = {"sft": "cpu-sft"} | {f"τ = {n}": f"cpu-dmtd-cycle{n}" for n in (2, 3, 4)}


def corpus() -> str:
    """Documents and tokens by kind of text."""
    result = result_of("corpus")
    kinds: dict[str, list[dict[str, Any]]] = {}
    for source in result["sources"].values():
        kinds.setdefault(source["kind"], []).append(source)
    sums = {kind: _sums(parts) for kind, parts in kinds.items()}
    rows = [[kind, *cells] for kind, cells in sums.items()]
    rows.append(["all", *_sums([result["total"]])])
    return table(["", "tokens", "documents", "held out", "prompts"], rows)


def _sums(parts: list[dict[str, Any]]) -> list[str]:
    names = ("tokens", "train_documents", "held_out_documents", "prompts")
    return [f"{sum(part.get(name, 0) for part in parts):,}" for name in names]


def answering() -> str:
    """Tokens a second of `mtd distill-data` by batch size, and what ended rows cost."""
    rows = result_of("cpu-answering")["rows"]
    first = rows[0]["tokens_per_second"]
    cells = {
        "over a batch of 1": [f"{row['tokens_per_second'] / first:.2f}x" for row in rows],
        "time for prompts": [f"{row['prompt_seconds'] / row['seconds']:.0%}" for row in rows],
        "rows at work": [f"{row['rows_at_work']:.0%}" for row in rows],
    }
    head = ["batch", *(str(row["batch_size"]) for row in rows)]
    return table(head, [[name, *values] for name, values in cells.items()])


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
        for row in result_of("cpu-sft")["held_out"]
    )
    return table(head, rows)


def cycles_speed() -> str:
    """DMTD beside plain decoding: speed-ups, and which share they are of the bound by bytes."""
    rows = result_of("cpu-dmtd-speed")["rows"]
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
    return table(["batch", *map(str, sizes)], lines)


def cycles_quality() -> str:
    """Held-out loss by step, with and without cycles, and the share of accuracy that is kept."""
    runs = {
        label: {line["step"]: line for line in result_of(name)["held_out"]}
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
        tokens = step * result_of("cpu-sft")["tokens"] / result_of("cpu-sft")["steps"]
        lines.append([str(step), f"{tokens / 1000:.0f}", *cells])
    return table(["steps", "thousand tokens", *runs], lines)


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
        last = result_of(name)["held_out"][-1]
        keys = ["held_out_loss_plain", *(f"held_out_loss_{n}" for n in (1, 2, 3, 4))]
        cells = [f"{last[key]:.3f}" if key in last else "-" for key in keys]
        lines.append([label, str(last["step"]), *cells])
    return table(head, lines)


def cycles_tasks() -> str:
    """Shares of right answers to tasks of lm-eval."""
    rows = result_of("cpu-dmtd-tasks")["rows"]
    names = [(task, name) for task, found in rows[0]["tasks"].items() for name in found]
    head = ["", *(f"{task}, {name.removesuffix(',none')}" for task, name in names)]
    cells = ([row["label"], *(f"{row['tasks'][t][n]:.2f}" for t, n in names)] for row in rows)
    return table(head, cells)


def samples() -> str:
    """Answers to the same prompts, shortened."""
    result = result_of("cpu-dmtd-samples")["rows"]
    names = list(result[0]["answers"])
    rows = ([_cell(row["prompt"]), *(_cell(row["answers"][n]) for n in names)] for row in result)
    return table(["prompt", *names], rows)


def _cell(text: str, limit: int = 300) -> str:
    text = " ".join(text.split()).replace("|", "\\|")
    return text if len(text) <= limit else f"{text[:limit].rsplit(' ', 1)[0]} ..."
