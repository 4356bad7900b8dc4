"""`mtd compile`: what a run would need and cost on a TPU pod, without the pod."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from mtd_jax.cli import arguments
from mtd_jax.config import ModelConfig, read_shape
from mtd_jax.convert.atomic import write_file
from mtd_jax.convert.load import read_description
from mtd_jax.evaluation import environment, pods
from mtd_jax.evaluation.pods_report import to_json
from mtd_jax.sharding import parse_mesh
from mtd_jax.training.config import read_config

_DESCRIPTION = """\
Compile the training step and the decode loops for a TPU topology, without a TPU (libtpu does it).

  mtd compile configs/pods/qwen3-4b-v5e-256.toml --topology v5e:16x16

CONFIG is a training config; its `model` may be a shape (configs/models/*.toml), and nothing else
that it names needs to be there. Heads, of which only the shapes matter, are compiled with the
config's [options] where it trains them, and draft chains. With mesh.slices = N the step is compiled
for N slices of the topology, and decoding for one. Seconds are an estimate:
max(FLOPs / peak, bytes / HBM bandwidth) + bytes sent / ring bandwidth. What does not fit in a
chip's memory is reported, and the exit code is 1.
"""
_FILE_WIDTH = 150


def add_parser(commands: arguments.Subparsers) -> None:
    """Declares the command."""
    parser = commands.add_parser(
        "compile", help="compile for a TPU pod that is not there", description=_DESCRIPTION
    )
    parser.add_argument("config", metavar="CONFIG", help="a training config (TOML)")
    parser.add_argument(
        "--topology", required=True, metavar="CHIP:AxB[xC]", help="v5e:16x16, v5p:4x4x4, v6e:16x16"
    )
    parser.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="change the config"
    )
    parser.add_argument(
        "--methods", default="ar,ngram", metavar="M,M,...", help="to decode (default: ar,ngram)"
    )
    parser.add_argument(
        "--decode-batch", type=int, metavar="B", help="rows (default: 8 for each part of the batch)"
    )
    parser.add_argument(
        "--decode-length", type=int, default=4096, metavar="S", help="cache slots (default: 4096)"
    )
    parser.add_argument(
        "--decode-mesh", metavar="data=N,tensor=N", help="default: tensor as many as key heads"
    )
    parser.add_argument("--train-only", action="store_true", help="leave decoding out")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--out", metavar="FILE.json", help="write that object to a file")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Runs `mtd compile`."""
    arguments.check_positive(args, "decode_batch", "decode_length")
    sizes = parse_mesh(args.decode_mesh) if args.decode_mesh else {}
    config = read_config(args.config, args.set)
    model = _model(config.model)
    topology = pods.Topology.of(args.topology)
    # The training step is for all slices; each decodes for itself.
    whole = pods.Topology.of(args.topology, config.mesh.slices)
    plan = None
    if not args.train_only:  # checked before minutes go by with the training step
        names, length = args.methods.split(","), args.decode_length
        plan = pods.DecodePlan.of(config, model, topology, sizes, names, args.decode_batch, length)
    with Console(stderr=True).status(f"compiling for {whole.name}") as status:
        found = [pods.train_step(config, model, whole)]
        decode: dict[str, Any] = {}
        if plan is not None:
            decode = {"decode_batch": plan.batch, "decode_length": plan.capacity}
            status.update(f"compiling decode loops for {topology.name}")
            found += pods.decode_programs(plan)
    result = {
        "versions": environment.versions(),
        **environment.provenance(),
        "model": Path(config.model).stem,
        "config": Path(args.config).name,
        "batch_size": config.data.batch_size,
        "length": config.data.length,
        "remat": config.memory.remat,
        **decode,
        **to_json(found, model, whole),
    }
    if args.out is not None:
        write_file(Path(args.out), json.dumps(result, indent=2) + "\n")
    if args.json:
        print(json.dumps(result))
    else:
        _show(result)
    return 0 if all(program.fits for program in found) else 1


def _model(path: str) -> ModelConfig:
    return read_shape(path) if path.endswith(".toml") else read_description(path)[0]


def _show(result: dict[str, Any]) -> None:
    chip = result["chip"]
    title = f"{result['model']} on {result['devices']} x {chip['name']} ({result['topology']})"
    table = Table(title=title)
    table.add_column("program")
    for column in ("mesh", "GiB", "fits", "TFLOP", "model", "HBM GB", "sent GB", "ms", "MFU"):
        table.add_column(column, justify="right")
    for row in result["programs"]:
        mesh = " x ".join(f"{axis} {n}" for axis, n in row["mesh"].items() if n > 1)
        cells = [row["name"], mesh, f"{row['bytes'] / 2**30:.2f}", "yes" if row["fits"] else "NO"]
        if row["fits"]:
            cells += [
                f"{row['flops'] / 1e12:.3g}",
                f"{row['model_flops'] / 1e12:.3g}",
                f"{row['hbm_traffic'] / 1e9:.1f}",
                f"{row['sent'] / 1e9:.2f}",
                f"{1e3 * row['seconds']['step']:.1f}",
                f"{row['mfu']:.1%}",
            ]
        table.add_row(*cells)
    console = Console()
    if not console.is_terminal:
        console = Console(width=_FILE_WIDTH)
    console.print(table)
    console.print(f"all of one device; {chip['hbm'] / 2**30:.0f} GiB of HBM a chip", soft_wrap=True)
    for row in result["programs"]:
        for line in _details(row, result["parameter_bytes"]):
            console.print(line, soft_wrap=True)


def _details(row: dict[str, Any], parameter_bytes: int) -> list[str]:
    if not row["fits"]:
        return [f"{row['name']} does not fit: {row['reason']}"]
    kinds = ", ".join(
        f"{c['count']} {kind} ({c['bytes'] / 1e9:.2f} GB)" for kind, c in row["collectives"].items()
    )
    share = row["largest_gather"] / parameter_bytes
    lines = [f"{row['name']}: {kinds or 'no collectives'}; largest gather {share:.1%} of the model"]
    if row["sent_between_slices"]:
        lines.append(
            f"{row['name']} hands {row['sent_between_slices'] / 1e9:.2f} GB to the network between "
            "slices, which the time leaves out"
        )
    if row["gathered_stacks"]:
        lines.append(
            f"{row['name']} GATHERS {row['gathered_stacks']} weights of all layers at once"
        )
    if row["compiler_seconds"] is not None:
        lines[0] += f"; the compiler's own estimate {1e3 * row['compiler_seconds']:.1f} ms"
    return lines
