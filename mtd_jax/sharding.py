"""Where arrays live: the mesh, and the rules from logical axis names to mesh axes.

The mesh has three axes. `data` splits the batch; `fsdp` splits the batch too and, along the model
width, the weights; `tensor` splits heads, MLP and vocabulary (Megatron, arXiv 1909.08053). Weights
and activations name their axes logically and only `RULES` knows the mesh, so the same code runs on
one device, eight simulated ones and a pod. Without a mesh (`jax.set_mesh` not active) every
function here does nothing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TypeVar

import jax
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

from mtd_jax.errors import InputError, unknown_name

MESH_AXES = ("data", "fsdp", "tensor")

RULES: Mapping[str, tuple[str, ...]] = {
    "batch": ("data", "fsdp"),
    "replica": ("data",),
    "layers": (),
    "embed": ("fsdp",),
    "heads": ("tensor",),
    "kv_heads": ("tensor",),
    "mlp": ("tensor",),
    "vocab": ("tensor",),
}
"""Logical axis -> the mesh axes that split it, outermost first."""

Tree = TypeVar("Tree")


def parse_mesh(text: str) -> dict[str, int]:
    """Sizes from the command line's `data=2,tensor=4`; axes not named have size 1.

    Raises:
      InputError: an unknown axis, a repeated one, or a size that is not a positive number.
    """
    sizes: dict[str, int] = {}
    for part in text.split(","):
        name, _, size = part.strip().partition("=")
        if name not in MESH_AXES:
            raise unknown_name("mesh axis", name, MESH_AXES)
        if name in sizes:
            raise InputError(f"mesh axis '{name}' is given twice")
        if not size.isdecimal() or len(size) > 6 or int(size) < 1:
            raise InputError(f"mesh axis '{name}' needs a positive size, got '{size[:20]}'")
        sizes[name] = int(size)
    return sizes


def make_mesh(sizes: Mapping[str, int], devices: Sequence[jax.Device] | None = None) -> Mesh:
    """A mesh over the first devices there are.

    Raises:
      InputError: an unknown axis, or more devices asked for than exist.
    """
    for name in sizes:
        if name not in MESH_AXES:
            raise unknown_name("mesh axis", name, MESH_AXES)
    shape = tuple(sizes.get(axis, 1) for axis in MESH_AXES)
    needed = shape[0] * shape[1] * shape[2]
    devices = list(jax.devices() if devices is None else devices)
    if needed > len(devices):
        raise InputError(f"the mesh needs {needed} devices, {len(devices)} are there")
    axis_types = (AxisType.Auto,) * len(MESH_AXES)
    return jax.make_mesh(shape, MESH_AXES, axis_types=axis_types, devices=devices[:needed])


def partition(
    mesh: Mesh | AbstractMesh, axes: Sequence[str | None], shape: Sequence[int]
) -> PartitionSpec:
    """The partition of an array with these logical axes and sizes.

    An axis that its mesh axes do not divide stays whole: three key/value heads on a tensor axis of
    two are replicated, which is correct and costs memory.

    Raises:
      ValueError: two axes of one array ask for the same mesh axis.
    """
    entries: list[tuple[str, ...] | None] = []
    taken: set[str] = set()
    for axis, size in zip(axes, shape, strict=True):
        wanted = RULES[axis] if axis is not None else ()
        if clash := taken.intersection(wanted):
            raise ValueError(f"axes {tuple(axes)} use mesh axis {sorted(clash)} twice")
        parts = 1
        for name in wanted:
            parts *= mesh.shape[name]
        if parts == 1 or size % parts:
            entries.append(None)
        else:
            entries.append(wanted)
            taken.update(wanted)
    return PartitionSpec(*entries)


def shardings(mesh: Mesh, declaration: Tree) -> Tree:
    """A `NamedSharding` for every weight of a declaration (`parameters.Weight` leaves)."""
    return jax.tree.map(
        lambda w: NamedSharding(mesh, partition(mesh, w.axes, w.shape)), declaration
    )


def constrain(x: jax.Array, *axes: str | None) -> jax.Array:
    """Pins `x` to the partition of its logical `axes`; the identity where no mesh is set."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return x
    return jax.lax.with_sharding_constraint(x, partition(mesh, axes, x.shape))
