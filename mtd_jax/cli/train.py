"""`mtd train`: fits a method to a model, from one TOML file."""

from __future__ import annotations

import argparse
import dataclasses
import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mtd_jax import methods
from mtd_jax.cli import arguments
from mtd_jax.cli.session import use_compilation_cache
from mtd_jax.convert.conversions import save_native
from mtd_jax.convert.fingerprint import fingerprint
from mtd_jax.convert.heads import save_heads
from mtd_jax.convert.load import check_weights, load_as_stored, read_description
from mtd_jax.decoding.draft_vocabulary import VOCABULARY, most_frequent
from mtd_jax.decoding.language_model import LanguageModel
from mtd_jax.decoding.requests import encode, read_prompts
from mtd_jax.directories import cache_directory
from mtd_jax.errors import InputError
from mtd_jax.evaluation import environment
from mtd_jax.parameters import count
from mtd_jax.training.agreement import refused_together
from mtd_jax.training.config import TrainConfig, read_config, to_dict
from mtd_jax.training.data import prepare
from mtd_jax.training.devices import Processes, training_mesh
from mtd_jax.training.heads import HeadsTraining, measured
from mtd_jax.training.log import read_log
from mtd_jax.training.loop import (
    Outcome,
    Run,
    behind_step,
    fit,
    flops_per_token,
    held_out_parts,
    restored,
)
from mtd_jax.training.plan import abstract_step, step_memory
from mtd_jax.training.rows import Rows, describe_row
from mtd_jax.training.step import Trainer
from mtd_jax.training.whole import WholeTraining
from mtd_jax.transformer.model import Parameters

_DESCRIPTION = """\
Train from one TOML file, on this machine or, started on every host with the same command, on all of
a cluster. A run that was stopped, or killed, goes on where it was when it is started again.

  mtd train configs/sft/smollm2-135m-gsm8k.toml --dry-run
  mtd train configs/sft/smollm2-135m-gsm8k.toml --set optimizer.steps=50 --set out=runs/try

In the run's directory: checkpoints/, log.jsonl, events/ for TensorBoard, loss.png, and at the end
model/, which decodes at once, or heads/, where weights of a decoding method were trained (both,
where they were trained together):

  mtd generate --model runs/try/model --prompt "..."
  mtd generate --model models/smollm2 --method medusa --heads runs/medusa/heads --prompt "..."

--export writes the same from a checkpoint that was kept, of a run that was stopped or is still
going on: from the one with the lowest held-out loss, the newest one, or one of a step:

  mtd train configs/sft/smollm2-135m-gsm8k.toml --export best

Several processes find each other by themselves on TPU pods and under Slurm; elsewhere name the
first one: --coordinator HOST:PORT --process-count N --process-index I (train/launch/ has examples).
"""
_HEADS, _MODEL = "heads", "model"
_HEADS_DTYPE = jnp.bfloat16
"""Guesses need no more digits, and heads travel with packages: what is lossless does not hang on
them."""


_COUNTED_ROWS = 4096
"""Rows from all over that frequent tokens are counted in, at most."""


def add_parser(commands: arguments.Subparsers) -> None:
    """Declares the command."""
    parser = commands.add_parser(
        "train", help="train heads, a method or the whole model", description=_DESCRIPTION
    )
    parser.add_argument("config", metavar="CONFIG.toml", help="what to train, from what, how")
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="change a key of the config: optimizer.steps=10; may be repeated",
    )
    parser.add_argument(
        "--dry-run",
        action="store_true",
        help="check everything, show shapes, a sample and the memory needed, and end",
    )
    parser.add_argument(
        "--export",
        metavar="best|last|STEP",
        help="train nothing; write the model or heads of a kept checkpoint, and end",
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    group = parser.add_argument_group("several processes")
    group.add_argument("--coordinator", metavar="HOST:PORT", help="of the first process")
    group.add_argument("--process-count", type=int, metavar="N")
    group.add_argument("--process-index", type=int, metavar="I", help="from 0")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Runs `mtd train`."""
    if args.export is not None and args.dry_run:
        raise InputError("--export and --dry-run do not go together")
    config = read_config(args.config, args.set)
    Processes(args.coordinator, args.process_count, args.process_index).join()
    use_compilation_cache()
    with refused_together():
        prepared = prepare_run(config)
    if args.dry_run:
        report = _dry_look(prepared)
        if args.json:
            print(json.dumps({**report, "sample": [piece._asdict() for piece in report["sample"]]}))
        else:
            _show(report)
        return 0
    if args.export is not None:
        outcome = restored(prepared, args.export)
        _export(prepared, outcome)
        if jax.process_index() == 0:
            _exported_line(prepared, outcome, as_json=args.json)
        return 0
    outcome = fit_and_write(prepared)
    if jax.process_index() == 0:
        _closing_line(prepared, outcome, as_json=args.json)
    return 0


def prepare_run(config: TrainConfig) -> Run:
    """Everything of a run but its weights, checked against each other.

    Raises:
      InputError: the first thing that does not fit.
    """
    model_path = Path(config.model)
    model, tokenizer = read_description(model_path)
    fingerprint = check_weights(model_path)
    trainer = Trainer.of(config)
    mesh = training_mesh(config.mesh)
    if Path(config.out).exists() and not Path(config.out).is_dir():
        raise InputError(f"out = {config.out} is there and is no directory")
    prompts = read_prompts(config.evaluate.prompts) if config.evaluate.prompts else []
    for prompt in prompts[: config.evaluate.prompt_limit]:
        encode(prompt, model, tokenizer, max_new_tokens=config.evaluate.new_tokens, chat=None)
    data = prepare(
        config.data,
        tokenizer,
        model,
        seed=config.seed,
        cache=cache_directory() / "tokens",
    )
    if isinstance(trainer.objective, HeadsTraining):
        trainer.objective.check_rows(data.train)
    trainer = _counted(trainer, data.train, model.vocab_size)
    run = Run(
        config=config,
        model=model,
        fingerprint=fingerprint,
        load=lambda: load_as_stored(model_path, mesh=mesh, reading=refused_together),
        trainer=trainer,
        mesh=mesh,
        train=data.train,
        held_out=data.held_out,
        prompts=prompts[: config.evaluate.prompt_limit],
    )
    run.share()
    abstract_step(config, model, trainer, mesh)  # what is frozen exists
    return run


def fit_and_write(run: Run) -> Outcome:
    """`loop.fit`, and what was trained, with its curve, where it ran to the end."""
    outcome = fit(run)
    if outcome.finished:
        _export(run, outcome)
        _draw(run.directory)
    return outcome


def _dry_look(run: Run) -> dict[str, Any]:
    config = run.config
    behind = behind_step(run)  # before anything is compiled
    state, frozen, _ = abstract_step(config, run.model, run.trainer, run.mesh)
    memory = step_memory(config, run.model, run.trainer, run.mesh)
    _, tokenizer = read_description(config.model)
    return {
        "method": config.method,
        "devices": {"kind": jax.devices()[0].device_kind, "mesh": dict(run.mesh.shape)},
        "trainable_parameters": count(state.trainable),
        "frozen_parameters": count(frozen),
        "batch": [config.data.batch_size, config.data.length],
        "steps": config.optimizer.steps,
        "goes_on_behind_step": behind,
        "data": {
            "train": _statistics(run.train),
            **({} if run.held_out is None else {"held_out": _statistics(run.held_out)}),
        },
        "flops_per_token": flops_per_token(run, state.trainable, frozen),
        "memory_per_device": {**dataclasses.asdict(memory), "total": memory.total},
        "sample": describe_row(run.train[0], tokenizer),
    }


def _statistics(rows: Rows) -> dict[str, float]:
    return dataclasses.asdict(rows.statistics)


def _show(report: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.text import Text

    console = Console(highlight=False)
    mesh = " x ".join(f"{axis} {size}" for axis, size in report["devices"]["mesh"].items())
    console.print(f"method      {report['method']}")
    console.print(f"devices     {report['devices']['kind']}: {mesh}")
    console.print(
        f"weights     {report['trainable_parameters']:,} trained, "
        f"{report['frozen_parameters']:,} frozen"
    )
    rows, length = report["batch"]
    console.print(f"a step      {rows} rows of {length} tokens; {report['steps']:,} steps")
    if report["goes_on_behind_step"] is not None:
        console.print(f"goes on     behind step {report['goes_on_behind_step']:,}")
    for name, values in report["data"].items():
        text = ", ".join(f"{key} {round(value, 3):,}" for key, value in values.items())
        console.print(f"{name:<11} {text}")
    console.print(f"FLOPs       {report['flops_per_token']:.3g} a token")
    parts = report["memory_per_device"]
    text = ", ".join(f"{name} {size / 1e9:.3g}" for name, size in parts.items())
    console.print(f"memory      of each device, GB: {text}")
    console.print(
        "\nthe first row; what is learned is [[so]], a new document begins at ¶\n", markup=False
    )
    shown, before = Text(), 0
    for piece in report["sample"]:
        if piece.segment not in (0, before):
            shown.append("¶", "bold")
        before = piece.segment
        text = f"[[{piece.text}]]" if piece.learned else piece.text
        shown.append(text, "green" if piece.learned else "dim")
    console.print(shown)


def result_of(run: Run) -> Path:
    """Where what was trained goes."""
    return run.directory / (_HEADS if run.config.method in methods.SPECS else _MODEL)


def _export(run: Run, outcome: Outcome) -> None:
    """What was trained: a model in the float type of its base, heads in `_HEADS_DTYPE`."""
    base, objective = run.load(), run.trainer.objective
    trainable, frozen = outcome.state.trainable, outcome.frozen
    steps = int(jax.device_get(outcome.state.step))
    if isinstance(objective, WholeTraining):
        params, trainable = trainable
        frozen = jax.tree.map(lambda w: w.astype(run.trainer.compute), params)
        base = _save_model(run, base, params, steps)
    if isinstance(objective, HeadsTraining):
        _save_heads(run, base, objective, trainable, frozen, steps)
    else:
        _save_model(run, base, objective.decoder(trainable, frozen)[0], steps)


def _save_heads(
    run: Run, base: LanguageModel, objective: HeadsTraining, trained: Any, frozen: Any, steps: int
) -> None:
    record: dict[str, Any] = {
        "steps": steps,
        "model": base.source,
        "config": to_dict(run.config),
        "rows": run.train.fingerprint,
        "versions": environment.versions(),
        **environment.provenance(),
    }
    if run.held_out is not None:
        weights = jax.tree.map(lambda w: w.astype(_HEADS_DTYPE), trained)
        with jax.set_mesh(run.mesh):
            record |= measured(objective, weights, frozen, held_out_parts(run))
    if objective.vocabulary:
        record[VOCABULARY] = list(objective.vocabulary)
    heads = objective.heads(trained, base.fingerprint, record)
    save_heads(heads, run.directory / _HEADS, dtype=_HEADS_DTYPE, force=True)


def _counted(trainer: Trainer, rows: Rows, size: int) -> Trainer:
    """The trainer, told which tokens the answers in the rows use most, if it drafts those alone."""
    objective = trainer.objective
    if not isinstance(objective, HeadsTraining) or not objective.vocabulary:
        return trainer
    some = (rows[i] for i in range(0, len(rows), max(1, len(rows) // _COUNTED_ROWS)))
    texts = (np.asarray(row.tokens[row.answer]) for row in some)
    ids = most_frequent(texts, size, objective.spec.vocabulary)
    return dataclasses.replace(trainer, objective=dataclasses.replace(objective, vocabulary=ids))


def _save_model(run: Run, base: LanguageModel, params: Parameters, steps: int) -> LanguageModel:
    """Writes the model, and returns it."""
    dtype = base.params.embedding.dtype
    params = jax.tree.map(lambda x: x.astype(dtype), params)
    note = f"{run.config.method}, {steps} steps from {base.fingerprint}"
    trained = LanguageModel(
        params=params,
        tokenizer=read_description(run.config.model)[1],
        mesh=run.mesh,
        fingerprint=fingerprint(params),
        source=f"{base.source}; {note}",
    )
    save_native(trained, run.directory / _MODEL, force=True)
    return trained


def _draw(directory: Path) -> None:
    """loss.png, where matplotlib is installed."""
    from mtd_jax.evaluation.plot import plot_losses

    if jax.process_index() == 0:
        plot_losses(read_log(directory), directory / "loss.png")


def _exported_line(run: Run, outcome: Outcome, *, as_json: bool) -> None:
    step, written = int(jax.device_get(outcome.state.step)), str(result_of(run))
    if as_json:
        print(json.dumps({"exported": written, "step": step}))
    else:
        print(f"{written}: the checkpoint behind step {step}")


def _closing_line(run: Run, outcome: Outcome, *, as_json: bool) -> None:
    lines = read_log(run.directory)
    losses = [line["loss"] for line in lines if "loss" in line]
    held_out = [line["held_out_loss"] for line in lines if "held_out_loss" in line]
    report = {
        "out": run.config.out,
        "finished": outcome.finished,
        "steps": int(jax.device_get(outcome.state.step)),
        "loss": losses[-1] if losses else None,
        "held_out_loss": held_out[-1] if held_out else None,
    }
    if as_json:
        print(json.dumps(report))
    elif outcome.finished:
        print(f"{result_of(run)}: loss {report['loss']}, held out {report['held_out_loss']}")
    else:
        print(f"stopped behind step {report['steps']}; the same command goes on from there")
