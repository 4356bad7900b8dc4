"""Writes the tables of README.md and docs/ from benchmarks/results/.

    python -m benchmarks.report

A table stands between `<!-- table NAME -->` and `<!-- end -->`; a test fails if a page and the
results disagree.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import partial

from benchmarks.tables import heads, pods, speed, training
from benchmarks.tables.results import ROOT

PAGES = (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))
_MARKED = re.compile(r"(<!-- table (\S+) -->\n).*?(<!-- end -->)", re.DOTALL)

TABLES: dict[str, Callable[[], str]] = {
    "heads-accuracy": heads.heads_accuracy,
    "cpu-transfer-layers": heads.transfer_layers,
    "cpu-transfer-chained": heads.transfer_chained,
    "cpu-transfer-rows": heads.transfer_rows,
    "cpu-cp-ranks": partial(heads.cp_ranks, "cpu-cp-ranks", "cpu-cp-balance"),
    "cpu-cp-overhead": heads.cp_overhead,
    "cpu-cp-guesses": heads.cp_guesses,
    "cpu-cp-losses": heads.cp_losses,
    "cpu-cp-heads": partial(speed.drafting, "cpu-cp-heads"),
    "cpu-cp-beam": partial(speed.drafting, "cpu-cp-beam"),
    "cpu-transfer-trees": partial(speed.drafting, "cpu-transfer-trees"),
    "corpus": training.corpus,
    "cpu-answering": training.answering,
    "cpu-dmtd-tasks": training.cycles_tasks,
    "cpu-layouts": partial(speed.layouts, "cpu-layouts"),
    "cpu-layouts-bfloat16": partial(speed.layouts, "cpu-layouts-bfloat16"),
    "cpu-flags": partial(speed.layouts, "cpu-flags"),
    "cpu-peers": speed.peers,
    "cpu-ar": speed.autoregressive,
    "cpu-first-token": speed.first_token,
    "cpu-whole-set-1": partial(speed.gains, "cpu-whole-set", 1),
    "cpu-whole-set": partial(speed.drafting, "cpu-whole-set"),
    "cpu-whole-set-kinds-1": partial(speed.kinds, "cpu-whole-set", 1),
    "cpu-methods": partial(speed.drafting, "cpu-methods"),
    "cpu-methods-1": partial(speed.gains, "cpu-methods", 1),
    "cpu-methods-kinds-1": partial(speed.kinds, "cpu-methods", 1),
    "cpu-speculative": partial(speed.drafting, "cpu-speculative"),
    "cpu-speculative-kinds-4": partial(speed.kinds, "cpu-speculative", 4),
    "cpu-code-editing": partial(speed.drafting, "cpu-code-editing"),
    "cpu-lossless": speed.lossless,
    "cpu-sft": training.fine_tuning,
    "cpu-dmtd-speed": training.cycles_speed,
    "cpu-dmtd-quality": training.cycles_quality,
    "cpu-dmtd-places": training.cycles_places,
    "cpu-dmtd-samples": training.samples,
    "cpu-verify-cost": speed.verify_cost,
    "pods": pods.pods,
    "pods-decoding": pods.pods_decoding,
}


def rendered(page: str) -> str:
    """The page with every marked table made anew."""
    return _MARKED.sub(lambda m: f"{m[1]}{TABLES[m[2]]()}{m[3]}", page)


def main() -> None:
    """Rewrites the pages."""
    for page in PAGES:
        page.write_text(rendered(page.read_text(encoding="utf-8")), encoding="utf-8")


if __name__ == "__main__":
    main()
