"""What a figure was measured on."""

from __future__ import annotations

import os
import platform
import shlex
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

import jax

from mtd_jax.kernels import library

_PACKAGES = ("mtd-jax", "jax", "jaxlib", "flax", "numpy", "transformers")


def hardware() -> dict[str, Any]:
    """Backend, devices, processor and cores; what multiplies a few rows with weights."""
    devices = jax.devices()
    return {
        "backend": jax.default_backend(),
        "device": devices[0].device_kind,
        "devices": len(devices),
        "processor": _processor(),
        "cores": len(os.sched_getaffinity(0)),
        "few_rows": library.about(),
    }


def provenance() -> dict[str, str | None]:
    """The command line, and the commit of the source tree if it is one (`+` for changes in it)."""
    root = Path(__file__).parents[2]
    commit = None
    if (root / ".git").exists():
        described = subprocess.run(
            ["git", "-C", str(root), "describe", "--always", "--abbrev=40", "--dirty=+"],
            capture_output=True,
            text=True,
            check=False,
        )
        commit = described.stdout.strip() or None
    program = Path(sys.argv[0])
    words = [program.name] if program.suffix != ".py" else ["python", str(program)]
    if program.name == "__main__.py":  # python -m mtd_jax.cli
        words = ["mtd"]
    elif program.suffix == ".py" and program.is_relative_to(root):  # python -m benchmarks.cp_ranks
        words = ["python", "-m", ".".join(program.relative_to(root).with_suffix("").parts)]
    return {"command": shlex.join([*words, *sys.argv[1:]]), "commit": commit}


def versions() -> dict[str, str]:
    """Python and the packages that speed depends on; those not installed are left out."""
    found = {"python": platform.python_version()}
    for name in _PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()
