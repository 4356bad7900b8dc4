r"""How often the guesses of trained heads were right on held-out answers, and their last losses.

    python -m benchmarks.guesses runs/cp-1/heads runs/cp-2/heads runs/cp-4/heads \
        --out benchmarks/results/cpu-cp-guesses.json

Nothing is measured here: `mtd train` did, and wrote it into `method.json` and, beside it, its log.
"""

from __future__ import annotations

import json
from pathlib import Path

from mtd_jax.cli.page import make_parser, run
from mtd_jax.convert.atomic import write_file
from mtd_jax.convert.method_files import read_method
from mtd_jax.decoding.heads import ACCURACIES
from mtd_jax.evaluation import environment
from mtd_jax.training.log import read_log

_KEPT = (ACCURACIES, "top1", "positions", "steps", "versions", "command", "commit")


def main() -> None:
    """Gathers, prints, writes."""
    parser = make_parser(__doc__)
    parser.add_argument("heads", nargs="+", type=Path, metavar="DIR", help="what training wrote")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    rows = []
    for directory in args.heads:
        file = read_method(directory)
        kept = {key: file.record[key] for key in _KEPT if key in file.record}
        evaluated = [line for line in read_log(directory.parent) if "held_out_loss" in line]
        kept |= {k: round(v, 5) for k, v in evaluated[-1].items() if k.startswith("held_out_")}
        rows.append({"method": file.method, "options": dict(file.options), **kept})
        print(file.method, dict(file.options), kept.get("top1"))
    result = {
        "hardware": environment.hardware(),
        "versions": environment.versions(),
        **environment.provenance(),
        "rows": rows,
    }
    if args.out is not None:
        write_file(args.out, json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    run(main, "guesses.py")
