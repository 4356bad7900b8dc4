"""libtpu is left alone where there is no TPU, and nowhere else."""

from __future__ import annotations

import glob
import importlib.metadata
import importlib.util
import os
import subprocess
import sys
from fnmatch import fnmatch
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from mtd_jax import backend

CARD = "/sys/bus/pci/devices/0000:00:04.0/vendor"


@pytest.mark.parametrize(
    ("changes", "set_to_cpu"),
    [
        ({}, True),
        ({"files": ["/dev/accel0"]}, False),
        ({"files": ["/dev/vfio/0"]}, False),
        ({"vendor": "0x1ae0\n"}, False),
        ({"installed": []}, False),
        ({"installed": ["libtpu", "jax_plugins"]}, False),
        ({"plugins": ["cuda12"]}, False),
        ({"config": "tpu,cpu"}, False),
        ({"environment": {"JAX_PLATFORMS": "tpu"}}, False),
        ({"environment": {"TPU_NAME": "pod"}}, False),
        ({"environment": {"TPU_SKIP_MDS_QUERY": "1", "TPU_LIBRARY_PATH": "x"}}, True),
        ({"environment": {"PJRT_NAMES_AND_LIBRARY_PATHS": "x:/y"}}, False),
    ],
    ids=lambda value: str(value),
)
def test_when_libtpu_is_left_alone(
    monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any], set_to_cpu: bool
) -> None:
    machine = {
        "files": [CARD],
        "vendor": "0x8086\n",
        "installed": ["libtpu"],
        "plugins": [],
        "config": None,
        "environment": {},
        **changes,
    }
    updates: list[tuple[str, str]] = []
    for name in [name for name in os.environ if "TPU" in name or name.startswith("JAX_PLAT")]:
        monkeypatch.delenv(name)
    for name, value in machine["environment"].items():
        monkeypatch.setenv(name, value)
    config = SimpleNamespace(
        jax_platforms=machine["config"], update=lambda *words: updates.append(words)
    )
    monkeypatch.setattr(backend, "jax", SimpleNamespace(config=config))
    files = machine["files"]
    monkeypatch.setattr(glob, "glob", lambda name: [f for f in files if fnmatch(f, name)])
    vendors = dict.fromkeys(files, machine["vendor"])
    monkeypatch.setattr(Path, "read_text", lambda self, encoding: vendors[str(self)])
    installed = machine["installed"]
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: object() if name in installed else None
    )
    monkeypatch.setattr(importlib.metadata, "entry_points", lambda group: machine["plugins"])
    backend.leave_libtpu_alone()
    assert updates == ([("jax_platforms", "cpu")] if set_to_cpu else [])


def test_libtpu_says_nothing_in_a_process_of_its_own() -> None:
    """As `mtd` starts: JAX is imported first, and sets variables for TPUs that are not there."""
    program = "import jax; from mtd_jax import backend; backend.leave_libtpu_alone(); jax.devices()"
    names = ("TPU", "JAX_PLAT", "PJRT")
    environment = {k: v for k, v in os.environ.items() if not any(n in k for n in names)}
    done = subprocess.run(
        [sys.executable, "-c", program],
        env=environment,
        capture_output=True,
        text=True,
        check=True,
        timeout=120,
    )
    assert "libtpu" not in done.stderr
