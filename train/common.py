"""What the programs beside this file share: their arguments, and the loop around `Trainer.step`."""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Mapping
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import jax

import mtd_jax as mtd
from mtd_jax.cli import page
from mtd_jax.cli.arguments import Parser
from mtd_jax.convert.atomic import check_free
from mtd_jax.convert.load import load_as_stored
from mtd_jax.training.batches import batches
from mtd_jax.training.config import TrainConfig, parse_config
from mtd_jax.training.data import prepare
from mtd_jax.training.devices import batch_sharding, share_of_rows, training_mesh
from mtd_jax.training.objective import Objective
from mtd_jax.training.step import Trainer, TrainState
from mtd_jax.transformer.losses import Totals


class Step(NamedTuple):
    """The run behind one of its steps."""

    model: mtd.LanguageModel
    objective: Objective
    state: TrainState
    frozen: Any
    measured: Totals


def make_parser(description: str | None) -> Parser:
    """What every program is told."""
    parser = page.make_parser(description)
    parser.add_argument("--model", required=True, metavar="PATH")
    parser.add_argument("--data", required=True, metavar="FILE.jsonl")
    parser.add_argument("--out", required=True, type=Path, metavar="DIR")
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--length", type=int, default=256, help="tokens of a row")
    parser.add_argument("--batch-size", type=int, default=4, help="rows of a step")
    return parser


def make_config(
    args: argparse.Namespace, *, learning_rate: float, **changes: str | Mapping[str, Any]
) -> TrainConfig:
    """The config that says the same as the arguments; `changes` are other entries of it."""
    check_free(args.out)
    return parse_config(
        {
            "model": args.model,
            "out": str(args.out),
            "data": {"train": [args.data], "length": args.length, "batch_size": args.batch_size},
            "optimizer": {"steps": args.steps, "learning_rate": learning_rate},
            **changes,
        }
    )


def trained(config: TrainConfig) -> Iterator[Step]:
    """Yields behind every step: a loss that is differentiated by its first argument, and AdamW."""
    # A mesh over all devices: rows of a batch are spread over it, weights as the mesh says.
    mesh, size = training_mesh(config.mesh), config.data.batch_size
    share_of_rows(mesh, size, accumulate=1)
    model = load_as_stored(config.model, mesh=mesh)
    out = Path(config.out)
    cache = out.with_name(f"{out.name}.tokens")
    rows = prepare(config.data, model.tokenizer, model.config, seed=0, cache=cache).train

    # What is trained is the first argument of the loss; what stays is an argument like the batch.
    trainer = Trainer.of(config)
    trainable, frozen = trainer.objective.split(model.params)
    frozen = jax.tree.map(lambda w: w.astype(trainer.compute), frozen)
    with jax.set_mesh(mesh):
        state = trainer.start(trainable, seed=0)
        step = jax.jit(trainer.step, donate_argnums=0)
        for local in islice(batches(rows, batch_size=size, seed=0), config.optimizer.steps):
            batch = jax.device_put(local, batch_sharding(mesh))
            state, measured = step(state, frozen, batch)
            yield Step(model, trainer.objective, state, frozen, measured)
