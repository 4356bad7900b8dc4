"""What differs between CPU, GPU and TPU: compiler options and the layout of weights.

Everything here was chosen by measurement (docs/performance.md) and changes speed only.
"""

from __future__ import annotations

import glob
import importlib.metadata
import importlib.util
import os
from pathlib import Path

import jax
import jax.numpy as jnp

from mtd_jax.kernels import few_rows

_CPU_DECODE: dict[str, int | str] = {
    # Products that `few_rows` does not take. One row: LLVM's matrix-vector loops at full AVX-512
    # width read weights 7 % faster.
    "xla_cpu_prefer_vector_width": 512,
    # 2-16 rows: Eigen's products are up to 1.35x faster than YNNPACK's on weights stored [in, out].
    "xla_cpu_experimental_ynn_fusion_type": "",
}

_GOOGLE = "0x1ae0"
"""Vendor on the PCI bus."""

_BY_JAX = {"TPU_SKIP_MDS_QUERY", "TPU_LIBRARY_PATH"}
"""In the environment from the import of JAX on, where libtpu is installed: they say nothing."""

_MAPS_SHARE = 0.7


def has_tpu() -> bool:
    """Whether this machine has TPU chips; asking JAX would start them."""
    return any(glob.glob(name) for name in ("/dev/accel[0-9]*", "/dev/vfio/[0-9]*"))


def leave_libtpu_alone() -> None:
    """Keeps JAX on the CPU where libtpu is installed, as for `mtd compile`, without a TPU.

    There libtpu prints five lines on stderr and takes two seconds to find out. Nothing is changed
    where somebody said what to use, or where there may be another accelerator or a TPU by another
    name.
    """
    said = getattr(jax.config, "jax_platforms", None) or os.environ.get("JAX_PLATFORMS")
    if said or importlib.util.find_spec("libtpu") is None:
        return
    others = (
        importlib.metadata.entry_points(group="jax_plugins")
        or importlib.util.find_spec("jax_plugins")
        or os.environ.get("PJRT_NAMES_AND_LIBRARY_PATHS")
        or any(name.startswith(("TPU_", "CLOUD_TPU_")) for name in os.environ.keys() - _BY_JAX)
    )
    if not (others or has_tpu() or _has_google_device()):
        jax.config.update("jax_platforms", "cpu")


def _has_google_device() -> bool:
    """A TPU, or one of its maker's other devices on the PCI bus."""
    vendors = (Path(name) for name in glob.glob("/sys/bus/pci/devices/*/vendor"))
    try:
        return any(vendor.read_text(encoding="ascii").strip() == _GOOGLE for vendor in vendors)
    except OSError:
        return True


def decode_options(platform: str | None = None) -> dict[str, int | str] | None:
    """Compiler options for programs that run a few rows against all weights.

    `platform` is what they are compiled for, where that is not the backend there is.
    """
    return dict(_CPU_DECODE) if (platform or jax.default_backend()) == "cpu" else None


def unrolls_layers() -> bool:
    """Whether decoding wants one buffer a layer instead of a stack.

    XLA for CPU copies a layer out of the stack before it multiplies with it: 20-50 % of a step.
    GPUs and TPUs read the stack in place, and compile one body instead of L.
    """
    return jax.default_backend() == "cpu"


def relative_step_cost(rows: int) -> float:
    """About what a decode step of so many rows costs, one row being 1: until it is measured.

    From docs/performance.md for CPUs. An accelerator reads its weights for hundreds of rows in the
    same time; what it pays is mostly attention and the host.
    """
    if few_rows.takes(rows, jnp.float32):
        return 1.0 + 0.045 * (rows - 1)
    if jax.default_backend() == "cpu":
        return 1.0 + 0.22 * (rows > 1) + 0.08 * (rows - 1)
    return 1.0 + 0.003 * (rows - 1)


def step_sizes() -> tuple[int, ...]:
    """Rows of a step, the newest token's among them, that `auto` chooses from by their costs.

    A program is compiled that holds a branch for each. From 32 rows on a CPU is bound by
    arithmetic, and no draft is worth that; an accelerator reads its weights for 64 as for one.
    """
    few = (1, 4, 8, 16)
    return few if jax.default_backend() == "cpu" else (*few, 32, 64)


def reads_prompts_alone() -> bool:
    """Whether the prompts of a batch are read one after another, in small chunks.

    A CPU is bound by arithmetic from some 64 rows on. Reading prompts of different lengths side by
    side brings it nothing, and pads each of them to the longest one's bucket.
    """
    return jax.default_backend() == "cpu"


def release_programs(share: float = _MAPS_SHARE) -> bool:
    """Forgets all compiled programs if the process has that share of the memory maps it may have.

    XLA for CPU maps the code of every kernel apart, 1,500 to 3,500 maps for a program of thirty
    layers, and the kernel ends a process that asks for more than `vm.max_map_count` (65,530). What
    is needed again is taken from the persistent cache, where there is one.
    """
    if jax.default_backend() != "cpu":
        return False
    try:
        limit = int(Path("/proc/sys/vm/max_map_count").read_text(encoding="ascii"))
        maps = Path("/proc/self/maps").read_bytes().count(b"\n")
    except (OSError, ValueError):  # another system, without that limit
        return False
    if maps < share * limit:
        return False
    jax.clear_caches()
    return True
