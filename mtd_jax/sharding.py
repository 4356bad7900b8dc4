"""Where arrays live: the mesh, and the rules from logical axis names to mesh axes.

The mesh has three axes. `data` splits the batch; `fsdp` splits the batch too and, along the model
width, the weights; `tensor` splits heads, MLP and vocabulary (Megatron, arXiv 1909.08053). Weights
and activations name their axes logically and only `RULES` knows the mesh, so the same code runs on
one device, eight simulated ones and a pod. Without a mesh (`jax.set_mesh` not active) every
function here does nothing.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import jax
from jax.experimental import mesh_utils
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
    return arrange(shape, devices[:needed])


def arrange(shape: tuple[int, ...], devices: Sequence[jax.Device]) -> Mesh:
    """The mesh with the axes `MESH_AXES` of these sizes, laid out to suit the network."""
    types = (AxisType.Auto,) * len(MESH_AXES)
    try:
        return jax.make_mesh(shape, MESH_AXES, axis_types=types, devices=devices)
    except NotImplementedError:
        # An axis of 8 in a torus of 4 x 4 x 4: one direction and half of another.
        placed = mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)
        return Mesh(placed, MESH_AXES, axis_types=types)


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
        # Inside `Shares.mapped` an array is this device's share already.
        wanted = tuple(name for name in wanted if name not in mesh.manual_axes)
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


def fetched(tree: Any) -> Any:
    """The arrays' values on the host: all of them on every process, wherever their parts lie."""
    if jax.process_count() == 1:
        return jax.device_get(tree)
    from jax.experimental import multihost_utils

    return multihost_utils.process_allgather(tree, tiled=True)


def parts(axis: str) -> int:
    """Into how many parts the mesh that is set splits a logical axis; 1 where none is set."""
    mesh = jax.sharding.get_abstract_mesh()
    sizes = dict(mesh.shape)
    return math.prod(sizes.get(name, 1) for name in RULES[axis])


@dataclasses.dataclass(frozen=True)
class Shares:
    """Code that runs on each device's rows of a batch, with whole weights (`shard_map`).

    Only the axes that split the batch are taken by hand; `tensor` stays the compiler's.
    """

    axes: tuple[str, ...]
    """Mesh axes that split the batch; none: everything here does nothing."""
    weights: tuple[PartitionSpec, ...]
    """How these axes split each leaf of the weights."""

    def mapped(self, function: Callable[..., Any], arguments: Any, results: Sequence[str]) -> Any:
        """`function(weights, rows, data)`, each device on its share.

        `results` says of each result what it is: `whole`, `rows`, or split as the `weights` are.
        """
        if not self.axes:
            return function(*arguments)
        structure = jax.tree.structure(arguments[0])
        rows, weights = PartitionSpec(self.axes), jax.tree.unflatten(structure, self.weights)
        places = {"whole": PartitionSpec(), "rows": rows, "weights": weights}
        found = tuple(places[name] for name in results)
        return jax.shard_map(
            function,
            in_specs=(weights, rows, rows),
            out_specs=found if len(found) > 1 else found[0],
            axis_names=set(self.axes),
            check_vma=False,
        )(*arguments)

    def gathered(self, weights: Any) -> Any:
        """Whole weights of a device's parts."""
        return self._each_split(
            weights, lambda x, name, axis: jax.lax.all_gather(x, name, axis=axis, tiled=True)
        )

    def scattered(self, grads: Any) -> Any:
        """Parts of the sum over all devices."""
        if not self.axes or grads is None:
            return grads
        parts = self._each_split(
            grads,
            lambda x, name, axis: jax.lax.psum_scatter(x, name, scatter_dimension=axis, tiled=True),
        )
        leaves, structure = jax.tree.flatten(parts)
        rest = [
            tuple(name for name in self.axes if name not in _names(spec)) for spec in self.weights
        ]
        return jax.tree.unflatten(
            structure,
            [jax.lax.psum(x, names) if names else x for x, names in zip(leaves, rest, strict=True)],
        )

    def summed(self, tree: Any) -> Any:
        """The sum over all devices."""
        return jax.lax.psum(tree, self.axes) if self.axes else tree

    def _each_split(self, tree: Any, change: Callable[[Any, str, int], Any]) -> Any:
        if not self.axes:
            return tree
        leaves, structure = jax.tree.flatten(tree)
        for number, spec in enumerate(self.weights):
            for axis, entry in enumerate(spec):
                for name in _tuple(entry):
                    leaves[number] = change(leaves[number], name, axis)
        return jax.tree.unflatten(structure, leaves)


def shares_of_batch(
    axes: Sequence[Sequence[str | None]], shapes: Sequence[Sequence[int]], rows: int
) -> Shares:
    """How the mesh that is set splits a batch of `rows` and weights of these logical axes."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return Shares((), ())
    names = tuple(n for n in _names(partition(mesh, ("batch",), (rows,))) if mesh.shape[n] > 1)

    def by_hand(spec: PartitionSpec) -> PartitionSpec:
        kept = [tuple(n for n in _tuple(entry) if n in names) for entry in spec]
        return PartitionSpec(*(entry or None for entry in kept))

    found = (by_hand(partition(mesh, a, shape)) for a, shape in zip(axes, shapes, strict=True))
    return Shares(names, tuple(found))


def _names(spec: PartitionSpec) -> tuple[str, ...]:
    return tuple(name for entry in spec for name in _tuple(entry))


def _tuple(entry: Any) -> tuple[str, ...]:
    """The mesh axes of a dimension: `PartitionSpec` keeps a single one as text."""
    return () if entry is None else (entry,) if isinstance(entry, str) else tuple(entry)
