"""The devices of a run: processes that find each other, the mesh, and which rows lie where."""

from __future__ import annotations

import dataclasses
import importlib.util
import os
import sys
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from mtd_jax.backend import has_tpu
from mtd_jax.errors import InputError, first_line
from mtd_jax.sharding import MESH_AXES, RULES, arrange
from mtd_jax.training.config import MeshConfig
from mtd_jax.training.rendezvous import find_each_other


@dataclasses.dataclass(frozen=True)
class Processes:
    """How the processes of a run find each other; nothing is found by itself (TPU pods, Slurm)."""

    coordinator: str | None = None
    """HOST:PORT of process 0."""
    count: int | None = None
    index: int | None = None

    def join(self) -> None:
        """Connects this process to the others; a run of one process does nothing.

        Must come before anything asks JAX for its devices.

        Raises:
          InputError: a part of the address is missing or wrong, or the others cannot be reached.
        """
        given = (self.coordinator, self.count, self.index)
        if all(x is None for x in given):
            if not _in_cluster():
                return
            self._initialize()
        elif any(x is None for x in given):
            raise InputError(
                "several processes need --coordinator, --process-count and --process-index together"
            )
        else:
            self._check()
            if self.count != 1:
                self._initialize()

    def _check(self) -> None:
        assert self.coordinator is not None
        assert self.count is not None
        assert self.index is not None
        host, colon, port = self.coordinator.rpartition(":")
        if not (host and colon and port.isdecimal() and 0 < int(port) < 65536):
            raise InputError(f"--coordinator takes HOST:PORT, got '{self.coordinator}'")
        if self.count < 1 or not 0 <= self.index < self.count:
            raise InputError(
                f"--process-index {self.index} is not within --process-count {self.count}"
            )

    def _initialize(self) -> None:
        timeout = _number("MTD_CONNECT_TIMEOUT", 300)
        if self.coordinator is None or self.count is None or self.index is None:
            # JAX finds the others, and if they do not come, ends the process with a stack trace.
            sys.stderr.write(f"other processes are waited for {timeout} s (MTD_CONNECT_TIMEOUT)\n")
        else:
            find_each_other(self.coordinator, self.count, self.index, timeout)
        try:
            jax.distributed.initialize(
                self.coordinator, self.count, self.index, initialization_timeout=timeout
            )
        except (RuntimeError, ValueError) as error:
            raise InputError(
                f"the processes of this run did not find each other: {first_line(error)}"
            ) from None


def _number(variable: str, default: int) -> int:
    text = os.environ.get(variable, str(default))
    if not text.isdecimal():
        raise InputError(f"{variable} must be a whole number, got '{text[:40]}'")
    return int(text)


def _in_cluster() -> bool:
    """Whether JAX can find out by itself that there are other processes.

    Asking its own detection would touch private names; asking it to connect where there is nothing
    to find raises. On a TPU host connecting always works, also for one host alone.
    """
    if os.environ.get("JAX_COORDINATOR_ADDRESS"):
        return True
    if "SLURM_STEP_ID" in os.environ and _number("SLURM_NTASKS", 1) > 1:
        return True
    if os.environ.get("JAX_PLATFORMS", "tpu").split(",")[0] != "tpu":
        return False
    return has_tpu() and importlib.util.find_spec("libtpu") is not None


def training_mesh(config: MeshConfig, devices: list[jax.Device] | None = None) -> Mesh:
    """The mesh of a run over all its devices.

    Slices (parts of the machine joined by a slower network) are the outermost part of `data`, so
    that only the sum of gradients crosses between them.

    Raises:
      InputError: the axes do not divide the devices.
    """
    found = list(jax.devices()) if devices is None else devices
    fixed = config.slices * config.fsdp * config.tensor
    data = config.data or len(found) // fixed
    needed = data * fixed
    if config.data and jax.process_count() == 1 and 0 < needed < len(found):
        found = found[:needed]  # asked for in so many words
    if needed != len(found):
        axes = f"slices {config.slices} x data {config.data or '(rest)'} x fsdp {config.fsdp} x "
        raise InputError(
            f"[mesh] {axes}tensor {config.tensor} does not divide {len(found)} devices"
        )
    shape = (data, config.fsdp, config.tensor)
    if config.slices == 1:
        return arrange(shape, found)
    return Mesh(_hybrid(shape, config.slices, found), MESH_AXES)


def _hybrid(shape: tuple[int, ...], slices: int, devices: list[jax.Device]) -> np.ndarray:
    from jax.experimental import mesh_utils

    known = {getattr(d, "slice_index", None) for d in devices}
    # GPUs and CPUs have no slices: there each process is one.
    by_process = len(known) == 1
    processes = {d.process_index for d in devices}
    if by_process and len(processes) == 1:
        # One process plays all slices: they are runs of its devices.
        return np.array(devices).reshape(slices * shape[0], *shape[1:])
    if slices != (len(processes) if by_process else len(known)):
        there = len(processes) if by_process else len(known)
        raise InputError(f"mesh.slices = {slices}, but {there} are there")
    return np.asarray(
        mesh_utils.create_hybrid_device_mesh(
            shape,
            (slices, 1, 1),
            devices,
            process_is_granule=by_process,
            allow_split_physical_axes=True,
        )
    )


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Rows of a batch over the axes that split it."""
    return NamedSharding(mesh, PartitionSpec(RULES["batch"], None))


def share_of_rows(mesh: Mesh, batch_size: int, accumulate: int) -> tuple[int, int]:
    """(number, of how many): the part of each batch that this process must bring.

    Raises:
      InputError: the batch is not divided by the devices.
    """
    parts = mesh.shape["data"] * mesh.shape["fsdp"]
    if batch_size // accumulate % parts:
        raise InputError(
            f"data.batch_size = {batch_size} in {accumulate} parts does not spread over "
            f"data x fsdp = {parts} devices"
        )
    rows: dict[int, set[int]] = {}
    places: Any = batch_sharding(mesh).devices_indices_map((batch_size, 1))
    for device, place in places.items():
        rows.setdefault(device.process_index, set()).update(range(batch_size)[place[0]])
    # A host of a pod holds a square of chips, so its rows are seldom in one piece. It brings them
    # in their order, which is how `make_array_from_process_local_data` takes them.
    shares = sorted({tuple(sorted(held)) for held in rows.values()})
    if sum(map(len, shares)) != batch_size or len({len(share) for share in shares}) > 1:
        raise InputError(
            "the mesh gives processes rows that overlap in part: order its axes otherwise"
        )
    return shares.index(tuple(sorted(rows[jax.process_index()]))), len(shares)
