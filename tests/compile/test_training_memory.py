"""What `mtd train --dry-run` says a step needs is what the process really takes."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.support import command_line, real
from tests.support.command_line import ROOT
from tests.support.training import write_config, write_model, write_texts

_PROGRAM = """
import gc, json, sys
import jax
from mtd_jax.cli.train import prepare_run
from mtd_jax.parameters import size_in_bytes
from mtd_jax.training.config import read_config
from mtd_jax.training.batches import batches
from mtd_jax.training.plan import step_memory

def resident(name):
    for line in open("/proc/self/status"):
        if line.startswith(name):
            return int(line.split()[1]) * 1024

run = prepare_run(read_config(sys.argv[1], sys.argv[2:]))
estimate = step_memory(run.config, run.model, run.trainer, run.mesh)
params = run.load().params
trainable, frozen = run.trainer.objective.split(params)
with jax.set_mesh(run.mesh):
    state = jax.block_until_ready(run.trainer.start(trainable, 0))
    batch = run.placed(next(batches(run.train, batch_size=run.config.data.batch_size, seed=0)))
    step = run.trainer.compile_step(state, frozen, batch)
    del params, trainable
    gc.collect()
    held = size_in_bytes(state) + size_in_bytes(batch) + size_in_bytes(frozen)
    open("/proc/self/clear_refs", "w").write("5")  # the peak begins anew
    before = resident("VmRSS")
    state, totals = step(state, frozen, batch)
    jax.block_until_ready(state)
    peak = resident("VmHWM") - before + held
print(json.dumps({"peak": peak, "estimate": estimate.total, "temporary": estimate.temporary}))
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("changes", "most"),
    [
        ({"memory__remat": "none"}, 0.15),
        ({"memory__remat": "layer"}, 0.15),
        # The CPU's kernels take scratch memory that the compiler does not count: most for heads.
        ({"method": "medusa"}, 0.3),
        ({"method": "hidden_transfer", "options__layers": "2"}, 0.3),
        ({"method": "cp", "options__rank": 4, "options__loss": "joint"}, 0.35),
        ({"method": "dmtd", "options__cycle": 2, "options__late": 2}, 0.15),
        ({"data__accumulate": 4}, 0.15),
    ],
    ids=["remat-none", "remat-layer", "medusa", "hidden-transfer", "cp", "dmtd", "accumulate"],
)
def test_peak_memory_is_near_the_estimate(
    tmp_path: Path, changes: dict[str, Any], most: float
) -> None:
    write_model(tmp_path, hidden_size=384, intermediate_size=1024, num_layers=4, head_dim=96)
    write_texts(tmp_path, count=2000)
    config = write_config(
        tmp_path, data__length=256, data__batch_size=32, optimizer__steps=1, **changes
    )
    found = _measured(config)
    assert abs(found["peak"] / found["estimate"] - 1) < most, found
    # What is held is the same number on both sides: what a step takes for itself must agree alone.
    taken = found["peak"] - (found["estimate"] - found["temporary"])
    assert abs(taken / found["temporary"] - 1) < most + 0.05, found


@pytest.mark.slow
@pytest.mark.parametrize(
    "recipe",
    [
        "sft/smollm2-135m-gsm8k",
        "dmtd/smollm2-135m-gsm8k",
        "medusa/smollm2-135m",
        "hidden_transfer/smollm2-135m",
        "cp/smollm2-135m",
    ],
)
def test_recipes_for_the_real_model_stay_within_what_they_say(tmp_path: Path, recipe: str) -> None:
    """There scratch memory, which is as large for a small model, is a small part of all."""
    texts = write_texts(tmp_path, count=1500)
    found = _measured(
        ROOT / "configs" / f"{recipe}.toml",
        f'model="{real.model_directory()}"',
        f'out="{tmp_path / "out"}"',
        f'data.train=["{texts}"]',
    )
    assert abs(found["peak"] / found["estimate"] - 1) < 0.15, found


def _measured(config: Path, *changes: str) -> dict[str, int]:
    """Bytes that a step was said to need, and those that its process took."""
    done = subprocess.run(
        [sys.executable, "-c", _PROGRAM, str(config), *changes],
        # glibc keeps an arena of freed memory for every thread, which no compiler knows of.
        cwd=ROOT,
        env=command_line.environment() | {"MALLOC_ARENA_MAX": "1"},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found: dict[str, int] = json.loads(done.stdout)
    return found
