"""The programs of a run compile for TPU pods, through libtpu, on a machine without a TPU.

Each test starts a process of its own: libtpu is set up by the environment, before JAX is.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
CONFIG = """\
model = "{model}"
out = "unused"
[data]
train = ["unused"]
length = 512
batch_size = 64
[mesh]
data = {data}
fsdp = {fsdp}
tensor = {tensor}
"""
SHAPE = """\
family = "llama"
vocab_size = 4096
hidden_size = 512
intermediate_size = 1024
num_layers = 3
num_heads = 8
num_kv_heads = 4
head_dim = 128
max_position = 65536
tie_embeddings = {tied}
"""


def mtd_compile(
    *arguments: str, expect: int = 0, optimized: bool = False
) -> subprocess.CompletedProcess[str]:
    """Compiles with the compiler's least effort, in a fifth of the time, unless it is `optimized`.

    How a program is partitioned, what it keeps and what it sends are the same; its speed is not.
    """
    ours = ("XLA_FLAGS", "JAX_DISABLE_MOST_OPTIMIZATIONS")
    environment = {k: v for k, v in os.environ.items() if k not in ours}
    if not optimized:
        efforts = ("JAX_EXEC_TIME_OPTIMIZATION_EFFORT", "JAX_MEMORY_FITTING_EFFORT")
        environment |= dict.fromkeys(efforts, "-1.0")
    found = subprocess.run(
        [sys.executable, "-m", "mtd_jax.cli", "compile", *arguments],
        cwd=ROOT, env=environment, capture_output=True, text=True, timeout=1200, check=False,
    )  # fmt: skip
    assert found.returncode == expect, found.stderr[-4000:]
    return found


def small(
    directory: Path,
    *,
    data: int = 2,
    fsdp: int = 4,
    tensor: int = 1,
    tied: bool = True,
    more: str = "",
) -> str:
    shape, config = directory / "shape.toml", directory / "run.toml"
    shape.write_text(SHAPE.format(tied=str(tied).lower()), encoding="utf-8")
    text = CONFIG.format(model=shape, data=data, fsdp=fsdp, tensor=tensor)
    config.write_text(text + more, encoding="utf-8")
    return str(config)


def check(program: dict[str, Any], report: dict[str, Any]) -> None:
    assert program["fits"]
    assert program["bytes"] < report["chip"]["hbm"]
    assert program["gathered_stacks"] == 0
    assert program["largest_gather"] < report["parameter_bytes"] / 2
    assert program["flops"] >= 0.9 * program["model_flops"] > 0
    assert program["seconds"]["step"] >= program["seconds"]["overlapped"] > 0
    assert 0 < program["mfu"] < 1


@pytest.mark.slow
@pytest.mark.timeout(1500)
@pytest.mark.parametrize(
    ("topology", "mesh", "method", "decoding"),
    [
        # Keys and values of all rows are 19 GB: more than one of the chips has.
        ("v5e:2x4", {"fsdp": 4}, "ar", ("--decode-batch", "48", "--decode-length", "65536")),
        # Eight is no direction of this torus, nor several.
        (
            "v5p:4x4x4",
            {"data": 8, "fsdp": 4, "tensor": 2, "tied": False},
            "ngram",
            ("--decode-mesh", "data=8,tensor=8", "--decode-length", "512"),
        ),
    ],
    ids=["v5e", "v5p"],
)
def test_training_and_decoding_compile(
    topology: str, mesh: Any, method: str, decoding: tuple[str, ...], tmp_path: Path
) -> None:
    out = tmp_path / "report.json"
    config = small(tmp_path, **mesh)
    where = ("--topology", topology, "--methods", method)
    mtd_compile(config, *where, *decoding, "--out", str(out))
    report = json.loads(out.read_text(encoding="utf-8"))
    names = [program["name"] for program in report["programs"]]
    assert names == ["train step", "read 512 prompt tokens", f"decode step, {method}"]
    for program in report["programs"]:
        check(program, report)
    step = report["programs"][0]
    # Each device sums the gradient of its own rows, and keeps its part of the sum.
    assert step["collectives"]["all-gather"]["count"] >= 3
    assert step["collectives"]["reduce-scatter"]["count"] >= 3


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_qwen3_4b_trains_on_256_chips(tmp_path: Path) -> None:
    out = tmp_path / "report.json"
    mtd_compile(
        "configs/pods/qwen3-4b-v5e-256.toml", "--topology", "v5e:16x16", "--train-only",
        "--out", str(out), optimized=True,
    )  # fmt: skip
    report = json.loads(out.read_text(encoding="utf-8"))
    step = report["programs"][0]
    check(step, report)
    assert report["devices"] == 256
    # The embedding, once: it is a tenth of the model, and no stack of layers is as large a share.
    assert step["largest_gather"] <= 2 * 151936 * 2560
    assert step["mfu"] > 0.4


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_between_slices_only_gradients_are_summed(tmp_path: Path) -> None:
    """Weights are gathered within a slice; each chip hands on its part of their gradient."""
    found = {}
    for slices in (1, 2):
        out = tmp_path / f"{slices}.json"
        mtd_compile(
            small(tmp_path, data=2, fsdp=2), "--topology", "v5e:2x2", "--train-only", "--out",
            str(out), "--set", f"mesh.slices={slices}",
        )  # fmt: skip
        report = json.loads(out.read_text(encoding="utf-8"))
        found[slices] = report["programs"][0]
        check(found[slices], report)
        assert report["devices"] == 4 * slices
    assert found[1]["sent_between_slices"] == 0
    # A slice sums first, so that each of its four chips hands on a quarter, in 16 or 32 bits.
    quarter = report["parameters"] / 4
    assert 2 * quarter <= found[2]["sent_between_slices"] <= 4 * quarter
    same = found[1]["collectives"]["all-gather"], found[2]["collectives"]["all-gather"]
    assert same[0]["largest"] == same[1]["largest"]


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_too_large_a_model_does_not_fit(tmp_path: Path) -> None:
    found = mtd_compile(
        "configs/pods/llama-3.1-8b-v5e-256.toml", "--topology", "v5e:2x2", "--train-only",
        "--set", "mesh.data=1", "--set", "mesh.fsdp=4", "--set", "data.batch_size=4", expect=1,
    )  # fmt: skip
    assert "does not fit" in found.stdout


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_heads_compile_without_weights(tmp_path: Path) -> None:
    """Those that the config trains with its options, the others with their own."""
    out = tmp_path / "report.json"
    found = mtd_compile(
        small(tmp_path, more="[options]\ncount = 2\n"), "--set", "method=medusa", "--topology",
        "v5e:2x4", "--methods", "medusa,independent_heads", "--decode-length", "512",
        "--out", str(out),
    )  # fmt: skip
    assert "error" not in found.stderr
    programs = {p["name"]: p for p in json.loads(out.read_text(encoding="utf-8"))["programs"]}
    assert list(programs)[2:] == ["decode step, medusa", "decode step, independent_heads"]
    assert all(program["fits"] for program in programs.values())


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--methods", "ar,ngrm"], "unknown method 'ngrm' (did you mean 'ngram'?)"),
        (["--decode-mesh", "tensor=3"], "does not divide the 8 devices"),
        (["--decode-batch", "3"], "--decode-batch 3 does not spread"),
        (["--decode-mesh", "tensr=2"], "unknown mesh axis 'tensr'"),
    ],
)
def test_slips_of_decoding_are_found_before_anything_is_compiled(
    flags: list[str], message: str, tmp_path: Path
) -> None:
    """The training step of this config would be refused as well, but only afterwards."""
    config = small(tmp_path)
    slip = ["--set", "mesh.fsdp=3", "--topology", "v5e:2x4", *flags]
    found = mtd_compile(config, *slip, expect=2)
    lines = [line for line in found.stderr.splitlines() if line.startswith("mtd: error")]
    assert len(lines) == 1
    assert message in lines[0]


@pytest.mark.parametrize(
    ("topology", "message"),
    [
        ("v9:2x2", "unknown TPU 'v9'"),
        ("v5e", "takes chip:AxB"),
        ("v5e:3x5x7", "no topology 'v5e:3x5x7'"),
        ("v5e:2x2", "does not divide 4 devices"),
    ],
)
def test_bad_input_is_one_line(topology: str, message: str, tmp_path: Path) -> None:
    found = mtd_compile(small(tmp_path), "--topology", topology, expect=2)
    lines = [line for line in found.stderr.splitlines() if line.startswith("mtd: error")]
    assert len(lines) == 1
    assert message in lines[0]
