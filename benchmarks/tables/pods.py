"""Programs compiled for pods that were not there."""

from __future__ import annotations

from typing import Any

from benchmarks.tables.results import result_of, table


def pods() -> str:
    """Training steps compiled for TPU pods that were not there."""
    head = ["model", "pod", "mesh", "GiB of HBM", "fits", "TFLOP", "of them the model's"]
    head += ["HBM GB", "sent GB", "largest gather", "ms", "MFU", "MFU if all overlaps"]
    rows = []
    for run in result_of("pods")["runs"]:
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
    return table(head, rows)


def pods_decoding() -> str:
    """Decode loops compiled for them."""
    head = ["model", "pod", "program", "rows x slots", "mesh", "GiB of HBM", "fits"]
    head += ["HBM GB", "sent GB", "ms"]
    rows = []
    for run in result_of("pods")["runs"]:
        for row in run["programs"][1:]:
            size = f"{run['decode_batch']} x {run['decode_length']}"
            cells = [*_pod(run), row["name"], size, *_fit(run, row)]
            if row["fits"]:
                cells += [f"{row['hbm_traffic'] / 1e9:.1f}", f"{row['sent'] / 1e9:.2f}"]
                cells += [f"{1e3 * row['seconds']['step']:.1f}"]
            rows.append(cells + ["-"] * (len(head) - len(cells)))
    return table(head, rows)


def _pod(run: dict[str, Any]) -> list[str]:
    return [run["model"], f"{run['devices']} {run['chip']['name']} ({run['topology']})"]


def _fit(run: dict[str, Any], row: dict[str, Any]) -> list[str]:
    mesh = " x ".join(f"{axis} {size}" for axis, size in row["mesh"].items() if size > 1)
    memory = f"{row['bytes'] / 2**30:.1f} of {run['chip']['hbm'] / 2**30:.0f}"
    return [mesh, memory, "yes" if row["fits"] else "NO"]
