"""`mtd sweep`: tries a training option's values in short runs and shows which is best."""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from mtd_jax.cli import arguments
from mtd_jax.cli.session import use_compilation_cache
from mtd_jax.cli.train import fit_and_write, prepare_run, result_of
from mtd_jax.convert.atomic import write_file
from mtd_jax.convert.load import read_description
from mtd_jax.convert.method_files import FILE, MethodFile, read_method
from mtd_jax.decoding.heads import ACCURACIES, accuracies_of
from mtd_jax.decoding.tree import build_tree
from mtd_jax.errors import InputError
from mtd_jax.evaluation import environment
from mtd_jax.evaluation.plot import plot_sweep
from mtd_jax.methods.options import layer_numbers
from mtd_jax.methods.transfer import HiddenTransferSpec
from mtd_jax.training.config import TrainConfig, read_config, to_dict
from mtd_jax.training.loop import Run, check_same_run

_DESCRIPTION = """\
Try the values of an option that has to be trained for, in short runs.

  mtd sweep hidden-transfer configs/hidden_transfer/smollm2-135m.toml --out runs/sweep --steps 200
"""
_TRANSFER_DESCRIPTION = """\
Where should the maps of Hidden Transfer stand? A low layer leaves the pseudo rows more layers to
grow in, a high one gives them a better state to begin with. All maps are put at one layer after
the other, a short run each, and measured on held-out texts.

  mtd sweep hidden-transfer CONFIG.toml --out runs/sweep --steps 200
  mtd sweep hidden-transfer CONFIG.toml --out runs/sweep --steps 200 --layers 8,12-18

The table shows, by layer, how often the first guess of each step was the base's own token, and the
tokens that a pass would emit with the best tree of 16 nodes. The best layers of each step are
where to begin; maps at different layers were not tried together. In the directory: sweep.json,
sweep.png (where matplotlib is), and a run for each layer, whose maps decode at once. A sweep that
was stopped goes on where it was: what is trained is not trained again.
"""
_MOST_BY_DEFAULT = 8
_TREE = 16


def add_parser(commands: arguments.Subparsers) -> None:
    """Declares the command."""
    parser = commands.add_parser(
        "sweep", help="try a training option's values", description=_DESCRIPTION
    )
    kinds = parser.add_subparsers(
        title="methods", dest="kind", required=True, metavar="METHOD", parser_class=arguments.Parser
    )
    transfer = kinds.add_parser(
        "hidden-transfer", help="at which layers maps stand", description=_TRANSFER_DESCRIPTION
    )
    transfer.add_argument("config", metavar="CONFIG.toml", help="of `mtd train`")
    transfer.add_argument("--out", required=True, type=Path, metavar="DIR", help="of the sweep")
    transfer.add_argument(
        "--layers",
        metavar="LIST",
        help=f"to try: 8,12-18 (default: {_MOST_BY_DEFAULT}, evenly over the model)",
    )
    transfer.add_argument(
        "--steps", type=int, metavar="N", help="of each run (default: as the config says)"
    )
    transfer.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="change a key of the config: data.length=256; may be repeated",
    )
    transfer.add_argument("--json", action="store_true", help="print one JSON object")
    transfer.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Runs `mtd sweep hidden-transfer`."""
    steps = [] if args.steps is None else [f"optimizer.steps={args.steps}"]
    config = read_config(args.config, [*args.set, *steps])
    if config.method != HiddenTransferSpec.name:
        raise InputError(f"{args.config} is for method '{config.method}', not hidden_transfer")
    if not config.data.held_out and not config.data.held_out_fraction:
        raise InputError("a sweep measures on held-out texts: give data.held_out_fraction=0.05")
    layers = _chosen(args.layers, read_description(Path(config.model))[0].num_layers)
    use_compilation_cache()
    # All of them before the first: a slip must not show behind an hour of training.
    runs = [prepare_run(_at_layer(config, layer, args.out)) for layer in layers]
    known = _finished(runs)
    rows: list[dict[str, Any]] = []
    for number, (layer, prepared) in enumerate(zip(layers, runs, strict=True), start=1):
        what = f"layer {layer} ({number} of {len(layers)})"
        if prepared.directory not in known:
            print(f"{what}: {config.optimizer.steps} steps", file=sys.stderr, flush=True)
            if not fit_and_write(prepared).finished:
                print("stopped; the same command goes on", file=sys.stderr)
                break
        else:
            print(f"{what}: trained before", file=sys.stderr, flush=True)
        rows.append(_measured(layer, read_method(result_of(prepared))))
        # After each: who looks while the others are trained sees what is known.
        write_file(args.out / "sweep.json", json.dumps(_report(config, rows), indent=2) + "\n")
        plot_sweep(rows, args.out / "sweep.png")
    if args.json:
        print(json.dumps(_report(config, rows) | {"finished": len(rows) == len(layers)}))
    elif rows:
        _show(rows)
    return 0


def _chosen(text: str | None, num_layers: int) -> list[int]:
    if text is None:
        count = min(_MOST_BY_DEFAULT, num_layers - 1)
        return sorted({round(x) for x in np.linspace(1, num_layers - 1, count)})
    found = sorted(layer_numbers("--layers", text))
    if not found:
        raise InputError("--layers names no layer")
    return found


def _at_layer(config: TrainConfig, layer: int, out: Path) -> TrainConfig:
    options = {**config.options, "layers": str(layer)}
    return dataclasses.replace(config, options=options, out=str(out / f"layer-{layer}"))


def _finished(runs: Sequence[Run]) -> set[Path]:
    """The directories of runs that ended before.

    Raises:
      InputError: one was made with other settings, of another base or from other texts.
    """
    ended = [run for run in runs if (result_of(run) / FILE).is_file()]
    base = ended[0].load().fingerprint if ended else ""
    for prepared in ended:
        file = read_method(result_of(prepared))
        saved = {"config": file.record.get("config"), "rows": file.record.get("rows")}
        now = {"config": to_dict(prepared.config), "rows": prepared.train.fingerprint}
        check_same_run(saved | {"base": file.base}, now | {"base": base})
    return {run.directory for run in ended}


def _measured(layer: int, file: MethodFile) -> dict[str, Any]:
    """How good the maps of a run are."""
    accuracies = accuracies_of(file.record)
    if accuracies is None:
        raise InputError("no held-out text was long enough to measure on: hold out more")
    shares = np.minimum.accumulate(accuracies, axis=1)
    return {
        "layer": layer,
        "top1": file.record["top1"],
        ACCURACIES: file.record[ACCURACIES],
        "tokens_a_pass": round(build_tree(shares, _TREE).expected_tokens(shares), 3),
    }


def _report(config: TrainConfig, rows: list[dict[str, Any]]) -> dict[str, Any]:
    best = []
    if rows:
        best = np.argmax([row["top1"] for row in rows], axis=0).tolist()
    return {
        "method": config.method,
        "steps": config.optimizer.steps,
        "options": dict(config.options),
        "hardware": environment.hardware(),
        "versions": environment.versions(),
        **environment.provenance(),
        "rows": rows,
        "best_layers": [rows[i]["layer"] for i in best],
    }


def _show(rows: list[dict[str, Any]]) -> None:
    table = Table(title="held-out accuracy of the first guess, by layer")
    steps = len(rows[0]["top1"])
    for name in ("layer", *(f"step {i + 1}" for i in range(steps)), "tokens a pass"):
        table.add_column(name, justify="right")
    columns = [[row["top1"][i] for row in rows] for i in range(steps)]
    columns.append([row["tokens_a_pass"] for row in rows])
    for number, row in enumerate(rows):
        cells = []
        for i, column in enumerate(columns):
            text = f"{column[number]:.1%}" if i < steps else f"{column[number]:.2f}"
            cells.append(f"[bold]{text}[/bold]" if column[number] == max(column) else text)
        table.add_row(str(row["layer"]), *cells)
    Console().print(table)
