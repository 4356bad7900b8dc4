"""How good trained heads are."""

from __future__ import annotations

import json
import statistics
from typing import Any

from benchmarks.tables.results import ROOT, result_of, table


def heads_accuracy() -> str:
    """How often guesses of the shipped heads are the base's own token, on held-out answers."""
    rows: list[list[str]] = []
    for path in sorted((ROOT / "mtd_jax" / "heads").glob("*/method.json")):
        told = json.loads(path.read_text(encoding="utf-8"))
        rows += _accuracies(told["method"], told["record"])
    return table(_ACCURACIES, rows)


def cp_guesses() -> str:
    """The same of CP heads by rank."""
    rows: list[list[str]] = []
    for row in sorted(result_of("cpu-cp-guesses")["rows"], key=lambda r: int(r["options"]["rank"])):
        rows += _accuracies(f"cp, rank {row['options']['rank']}", row)
    return table(_ACCURACIES, rows)


_ACCURACIES = ["heads", "place", "best guess", "among the best 2", "3", "4", "5"]


def _accuracies(name: str, record: dict[str, Any]) -> list[list[str]]:
    """A line for every place."""
    return [
        [name, f"n + {i + 1}", *(f"{sum(ranks[: n + 1]):.1%}" for n in range(5))]
        for i, ranks in enumerate(record["accuracies"], start=1)
    ]


def transfer_layers() -> str:
    """Hidden Transfer's guesses by the layer of its maps."""
    head, rows = _by_layer(result_of("cpu-transfer-layers"))
    return table(head, rows)


def transfer_chained() -> str:
    """The same, with and without sight of the earlier pseudo rows of a place."""
    head, without = _by_layer(result_of("cpu-transfer-unchained"))
    layers = [row[0] for row in without]
    _, found = _by_layer(result_of("cpu-transfer-layers"))
    rows = [[*row, "yes"] for row in found if row[0] in layers]
    rows += [[*row, "no"] for row in without]
    return table([*head, "sees earlier rows"], sorted(rows, key=lambda row: int(row[0])))


def _by_layer(result: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    steps = range(len(result["rows"][0]["top1"]))
    head = ["layer", *(f"step {i + 1}" for i in steps), "tokens a pass"]
    rows = [
        [
            str(row["layer"]),
            *(f"{row['top1'][i]:.1%}" for i in steps),
            f"{row['tokens_a_pass']:.2f}",
        ]
        for row in result["rows"]
    ]
    return head, rows


def transfer_rows() -> str:
    """How alike Hidden Transfer's pseudo rows and real rows are, by layer."""
    rows = result_of("cpu-transfer-rows")["by_layer"]
    head = ["layers passed", *(f"step {i + 1}" for i in range(len(rows[0]["cosine"])))]
    cells = (
        [str(row["layer"]), *("-" if x is None else f"{x:.2f}" for x in row["cosine"])]
        for row in rows
    )
    return table(head, cells)


_OF_RANKS = {
    "joint": "joint loss",
    "conditional_1": "first token",
    "conditional_2": "second, given the first",
    "usage_entropy": "entropy of usage",
    "mean_acceptance_length": "mean acceptance length",
    "speedup": "vs no drafts",
}


def cp_ranks(*names: str) -> str:
    """CP heads from random weights by rank and balance: means of the seeds, half of their range."""
    rows = []
    for name in names:
        found = result_of(name)["rows"]
        for rank, balance in sorted({(row["rank"], row["balance"]) for row in found}):
            seeds = [row for row in found if (row["rank"], row["balance"]) == (rank, balance)]
            cells = (_spread([row[key] for row in seeds]) for key in _OF_RANKS)
            own = f"{seeds[0]['parameters']['heads'] / 1e3:.0f} k"
            speeds = (
                f"{statistics.mean(row[key] for row in seeds):.0f}"
                for key in ("plain_tokens_per_second", "tokens_per_second")
            )
            rows.append([str(rank), f"{balance:g}", str(len(seeds)), own, *cells, *speeds])
    head = ["rank", "balance", "seeds", "parameters of the heads", *_OF_RANKS.values()]
    return table([*head, "tokens/s without drafts", "with"], rows)


_OF_TRUNKS = ("joint", "mean_acceptance_length", "speedup")


def cp_trunks() -> str:
    """CP heads over models of bytes that were trained before, with them and below them."""
    found = result_of("cpu-cp-trunks")["rows"]
    ways = {
        "heads alone": [row for row in found if row["trunk"] == "frozen"],
        "heads and model": [row for row in found if row["trunk"] == "trained"],
        "both from random weights": result_of("cpu-cp-twice")["rows"],
    }
    rows = []
    for way, seeds in ways.items():
        frozen = seeds[0]["trunk"] == "frozen"
        columns = (
            [row["base_loss"] for row in seeds],
            [row["base_loss" if frozen else "conditional_1"] for row in seeds],
            *([row[key] for row in seeds] for key in _OF_TRUNKS),
        )
        cells = ("-" if column[0] is None else _spread(column) for column in columns)
        rows.append([way, str(seeds[0]["steps"]), str(len(seeds)), *cells])
    head = ["trained", "steps", "seeds", "loss of the model before", "of the token that is decoded"]
    return table([*head, *(_OF_RANKS[key] for key in _OF_TRUNKS)], rows)


def cp_losses() -> str:
    """What CP heads over a trained base come to on held-out answers, by rank."""
    found = sorted(result_of("cpu-cp-guesses")["rows"], key=lambda r: int(r["options"]["rank"]))
    rows = [
        [str(row["options"]["rank"]), *(f"{row[f'held_out_{key}']:.3f}" for key in _LOSSES)]
        for row in found
    ]
    return table(["rank", *_LOSSES.values()], rows)


_LOSSES = {
    "joint": "joint loss of four tokens",
    "conditional_1": "first token",
    "conditional_2": "second, given the first",
    "usage_entropy": "entropy of usage",
}


def cp_overhead() -> str:
    """What CP heads read and take beside one row through the base's output head."""
    rows = result_of("cpu-cp-overhead")["rows"]
    sizes = dict.fromkeys((row["rank"], row["tokens"]) for row in rows)
    head = ["", *(f"r = {rank}, n = {tokens}" for rank, tokens in sizes)]
    lines = [
        [
            f"{name}, {count:,} tokens",
            *(f"{row[key]:.2f}x" for row in rows if row["vocabulary"] == count),
        ]
        for count in dict.fromkeys(row["vocabulary"] for row in rows)
        for name, key in (("bytes", "bytes_ratio"), ("time", "ratio"))
    ]
    return table(head, lines)


def _spread(values: list[float]) -> str:
    if len(values) == 1:
        return f"{values[0]:.3f}"
    half = (max(values) - min(values)) / 2
    return f"{statistics.mean(values):.3f} ± {half:.3f}"
