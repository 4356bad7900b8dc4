"""The programs of a run, compiled for TPUs that are not there, and what they would cost.

libtpu compiles for any topology on any machine. What comes out is the program that the pod would
run: its memory is known to the byte, its collectives are in its text, and only time is estimated.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib.util
import math
import os
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding

from mtd_jax import methods, parameters
from mtd_jax.config import ModelConfig
from mtd_jax.decoding import engine
from mtd_jax.decoding.heads import Heads
from mtd_jax.decoding.method import DecodeState, Method, Requests
from mtd_jax.decoding.prompt import CHUNK
from mtd_jax.decoding.sampling import Sampling, SamplingRows
from mtd_jax.errors import InputError, first_line, unknown_name
from mtd_jax.evaluation.chips import CHIPS, Chip, Roofline
from mtd_jax.evaluation.program_cost import Cost, program_cost
from mtd_jax.sharding import RULES, make_mesh, partition, shardings
from mtd_jax.training import utilization
from mtd_jax.training.config import TrainConfig
from mtd_jax.training.devices import share_of_rows, training_mesh
from mtd_jax.training.objective import reaches_layers
from mtd_jax.training.plan import abstract_parameters, abstract_step, compile_step
from mtd_jax.training.step import Trainer
from mtd_jax.transformer.model import Parameters, declare

_STOP_IDS = 8
# "Used 25.9G of 15.75G hbm", "required for HLO temporaries (54.30G) exceeds available HBM"
_USED = re.compile(r"(?:Used |\()([\d.]+)([KMGT]?)\)?(?: of| exceeds)")
_UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}


@dataclasses.dataclass(frozen=True)
class Topology:
    """Devices that need not be there."""

    name: str
    chip: Chip
    devices: tuple[Any, ...]

    @classmethod
    def of(cls, name: str, slices: int = 1) -> Topology:
        """So many slices of the topology of a name like `v5e:16x16`, one behind another.

        Must come before anything asks JAX for its devices: it keeps JAX on the CPU.

        Raises:
          InputError: libtpu is missing, or it knows no such topology.
        """
        kind, colon, shape = name.partition(":")
        if kind not in CHIPS:
            raise unknown_name("TPU", kind, CHIPS)
        if not colon or not re.fullmatch(r"\d{1,4}(x\d{1,4}){1,2}", shape):
            raise InputError(f"--topology takes chip:AxB or chip:AxBxC, got '{name[:40]}'")
        if importlib.util.find_spec("libtpu") is None:
            raise InputError("compiling for TPUs needs libtpu: pip install 'mtd-jax[tpu]'")
        os.environ.update(
            TPU_SKIP_MDS_QUERY="1", ALLOW_MULTIPLE_LIBTPU_LOAD="1", TPU_WORKER_HOSTNAMES="localhost"
        )
        jax.config.update("jax_platforms", "cpu")
        from jax.experimental import topologies

        try:
            found = topologies.get_topology_desc(
                platform="tpu", topology_name=name, num_slices=slices
            )
        except (RuntimeError, ValueError) as error:
            raise InputError(f"libtpu knows no topology '{name}': {first_line(error)}") from None
        name = name if slices == 1 else f"{slices} slices of {name}"
        return cls(name, CHIPS[kind], tuple(found.devices))


@dataclasses.dataclass(frozen=True)
class Compiled:
    """What is known of one program; sizes in bytes of a device, `None` if it does not fit."""

    name: str
    mesh: dict[str, int]
    chip: Chip
    fits: bool
    total: int
    """Arguments, what lives inside a run, code. Of what does not fit, what it asked for."""
    reason: str = ""
    """Why it does not fit, in the compiler's words."""
    arguments: int | None = None
    temporaries: int | None = None
    cost: Cost | None = None
    roofline: Roofline | None = None
    model_flops: float = 0.0
    """Of a device, without anything that is computed twice or masked away."""
    compiler_seconds: float | None = None
    """The compiler's own estimate where it is one; it counts the body of a loop once."""
    largest_gather: int = 0
    """Bytes of the largest array that an all-gather makes."""
    gathered_stacks: int = 0
    """All-gathers of a weight of all layers at once: none is right."""

    @property
    def mfu(self) -> float | None:
        """Model FLOPs over what the chip could do in `roofline.step`."""
        if self.roofline is None:
            return None
        return self.model_flops / (self.chip.flops * self.roofline.step)


def train_step(config: TrainConfig, model: ModelConfig, topology: Topology) -> Compiled:
    """The step that `mtd train` runs on these devices.

    Raises:
      InputError: the mesh does not divide the devices, or the batch the mesh.
    """
    mesh = training_mesh(config.mesh, list(topology.devices))
    if mesh.size != len(topology.devices):
        raise InputError(f"[mesh] takes {mesh.size} of the {len(topology.devices)} devices")
    share_of_rows(mesh, config.data.batch_size, config.data.accumulate)
    trainer = Trainer.of(config, "tpu")
    state, frozen, _ = abstract_step(config, model, trainer, mesh)
    tokens = config.data.batch_size * config.data.length
    whole = np.ones((1, config.data.length), np.int32)
    seen = utilization.keys_seen(model, whole)
    operations = trainer.objective.flops(state.trainable, frozen)
    backward = reaches_layers(state.trainable)
    operations += utilization.attention_flops(model, seen, backward=backward)
    return _examined(
        "train step",
        lambda: compile_step(config, model, trainer, mesh),
        mesh,
        topology.chip,
        model,
        operations * tokens / mesh.size,
    )


def decode_mesh(model: ModelConfig, topology: Topology, sizes: dict[str, int]) -> Mesh:
    """The mesh of decoding: as asked for, or weights over as many devices as there are key heads.

    Raises:
      InputError: the mesh does not divide the devices.
    """
    count = len(topology.devices)
    sizes = sizes or {"tensor": math.gcd(model.num_kv_heads, count)}
    rest = math.prod(sizes.values())
    if "data" not in sizes and count % rest == 0:
        sizes = {"data": count // rest, **sizes}
    if math.prod(sizes.values()) != count:
        text = ", ".join(f"{name}={size}" for name, size in sizes.items())
        raise InputError(f"the mesh {text} does not divide the {count} devices of {topology.name}")
    return make_mesh(sizes, topology.devices)


@dataclasses.dataclass(frozen=True)
class DecodePlan:
    """What is decoded, checked before anything is compiled."""

    model: ModelConfig
    topology: Topology
    mesh: Mesh
    makers: dict[str, Callable[[Any], Method]]
    """Name of a method -> the method, from its weights."""
    weights: dict[str, Any]
    """Name of a method -> its weights as shapes on the mesh; nothing where it has none."""
    batch: int
    capacity: int
    """Cache slots of a row."""

    @classmethod
    def of(
        cls,
        config: TrainConfig,
        model: ModelConfig,
        topology: Topology,
        sizes: dict[str, int],
        names: Sequence[str],
        batch: int | None,
        capacity: int,
    ) -> DecodePlan:
        """The plan; methods with heads take the config's options where it trains them.

        Args:
          sizes: of the mesh; {}: weights over as many devices as there are key heads.
          batch: rows; None: 8 for each part of the batch.

        Raises:
          InputError: an unknown method, one that does not fit the model, a mesh that does not
            divide the devices, or a batch that the mesh does not divide.
        """
        mesh = decode_mesh(model, topology, sizes)
        rows = math.prod(mesh.shape[name] for name in RULES["batch"])
        batch = 8 * rows if batch is None else batch
        if batch % rows:
            raise InputError(
                f"--decode-batch {batch} does not spread over data x fsdp = {rows} devices"
            )
        makers, weights = {}, {}
        for name in names:
            options = config.options if name == config.method else {}
            makers[name], weights[name] = _maker(name, options, model, mesh)
            method = jax.eval_shape(makers[name], weights[name])
            method.check(model, frozenset())
        return cls(model, topology, mesh, makers, weights, batch, capacity)


def _maker(
    name: str, options: Mapping[str, Any], model: ModelConfig, mesh: Mesh
) -> tuple[Callable[[Any], Method], Any]:
    """How a method is made from its weights, and these as shapes."""
    if name not in methods.SPECS:
        return lambda _: methods.make_method(name, {}), ()
    declared = methods.make_spec(name, options).declare(model)
    weights = jax.tree.map(
        lambda w, place: jax.ShapeDtypeStruct(w.shape, jnp.bfloat16, sharding=place),
        declared,
        shardings(mesh, declared),
    )
    # Trees by size need measurements of the heads, and are others from one to the next.
    sized = options.get("tree", "auto") in ("auto", "measured")
    tree = {"tree": "chain"} if sized else {}
    return lambda w: methods.make_method(name, tree, Heads(name, options, "", w)), weights


def decode_programs(plan: DecodePlan) -> list[Compiled]:
    """Reading a chunk of the prompts, and a step of every method's decode loop."""
    model, mesh, batch, capacity = plan.model, plan.mesh, plan.batch, plan.capacity
    params = abstract_parameters(model, mesh, jnp.bfloat16)
    made = [_placed(maker, plan.weights[name], mesh) for name, maker in plan.makers.items()]
    requests = _requests(batch, mesh)
    tokens = _of(mesh, (batch, min(CHUNK, capacity)), "batch", None)
    lengths = _of(mesh, (batch,), "batch")
    weights = _product_weights(model)
    heads = model.num_layers * model.num_heads * model.head_dim
    found = []
    with jax.set_mesh(mesh):
        examined = functools.partial(_examined, mesh=mesh, chip=plan.topology.chip, model=model)
        chunk = tokens.shape[1]
        forward = 2.0 * weights + 4.0 * heads * (chunk + 1) / 2
        found.append(
            examined(
                f"read {chunk} prompt tokens",
                engine.lower_start(
                    made[0], params, tokens, lengths, requests, capacity, "tpu"
                ).compile,
                model_flops=forward * batch * chunk / mesh.size,
            )
        )
        step = (2.0 * weights + 4.0 * heads * capacity) * batch / mesh.size
        for name, method in zip(plan.makers, made, strict=True):
            state = _state(method, params, tokens, lengths, requests, capacity, mesh)
            lowered = engine.lower_run(method, params, state, "tpu")
            found.append(examined(f"decode step, {name}", lowered.compile, model_flops=step))
    return found


def _examined(
    name: str, compile_it: Any, mesh: Mesh, chip: Chip, model: ModelConfig, model_flops: float
) -> Compiled:
    sizes = {axis: int(size) for axis, size in mesh.shape.items()}
    try:
        compiled = compile_it()
    except jax.errors.JaxRuntimeError as error:
        used = _USED.search(str(error))
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        asked = int(float(used[1]) * _UNITS[used[2]]) if used else 0
        reason = str(error).strip().splitlines()[0].partition("RESOURCE_EXHAUSTED: ")[2][:200]
        return Compiled(name, sizes, chip, fits=False, total=asked, reason=reason)
    memory = compiled.memory_analysis()
    outside = max(memory.output_size_in_bytes - memory.alias_size_in_bytes, 0)
    inside = memory.temp_size_in_bytes + outside + memory.generated_code_size_in_bytes
    cost = program_cost(compiled.as_text())
    roofline = Roofline.of(cost, chip)
    estimate = float((compiled.cost_analysis() or {}).get("optimal_seconds", -1.0))
    gathers = [c for c in cost.collectives.values() if c.kind == "all-gather"]
    stacks = _stack_sizes(model, sizes["tensor"])
    return Compiled(
        name=name,
        mesh=sizes,
        chip=chip,
        fits=True,  # or it would not have compiled
        total=memory.argument_size_in_bytes + inside,
        arguments=memory.argument_size_in_bytes,
        temporaries=inside,
        cost=cost,
        roofline=roofline,
        model_flops=model_flops,
        compiler_seconds=estimate if math.isfinite(estimate) and estimate > 0 else None,
        largest_gather=max((c.largest for c in gathers), default=0),
        gathered_stacks=sum(c.elements in stacks for c in gathers),
    )


def _stack_sizes(model: ModelConfig, tensor: int) -> set[int]:
    """Elements of the matrices of all layers, whole or split by heads."""
    blocks = declare(model).blocks
    sizes = [math.prod(w.shape) for w in jax.tree.leaves(blocks) if len(w.shape) > 2]
    return {size // parts for size in sizes for parts in (1, tensor)}


def _product_weights(model: ModelConfig) -> int:
    """Weights that a token is multiplied with."""
    declared = declare(model)
    lookup = 0 if model.tie_embeddings else math.prod(declared.embedding.shape)
    return parameters.count(declared) - lookup


def _of(mesh: Mesh, shape: tuple[int, ...], *axes: str | None, dtype: Any = jnp.int32) -> Any:
    place = NamedSharding(mesh, partition(mesh, axes, shape))
    return jax.ShapeDtypeStruct(shape, dtype, sharding=place)


def _abstract(tree: Any, mesh: Mesh) -> Any:
    return jax.tree.map(lambda x: _of(mesh, x.shape, *[None] * x.ndim, dtype=x.dtype), tree)


def _placed(maker: Callable[[Any], Method], weights: Any, mesh: Mesh) -> Method:
    """A method as shapes: its weights lie where slices of the given ones would, the rest whole."""
    if not jax.tree.leaves(weights):
        return _abstract(maker(weights), mesh)
    shapes = jax.eval_shape(maker, weights)
    places = jax.jit(maker).lower(weights).compile().output_shardings
    return jax.tree.map(
        lambda x, place: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), shapes, places
    )


def _requests(batch: int, mesh: Mesh) -> Requests:
    rows = SamplingRows.of([Sampling()] * batch)
    sampling = jax.tree.map(
        lambda x: _of(mesh, x.shape, "batch", *[None] * (x.ndim - 1), dtype=x.dtype), rows
    )
    return Requests(
        budget=_of(mesh, (batch,), "batch"),
        stop_ids=_of(mesh, (_STOP_IDS,), None),
        sampling=sampling,
    )


def _state(
    method: Method,
    params: Parameters,
    tokens: Any,
    lengths: Any,
    requests: Requests,
    capacity: int,
    mesh: Mesh,
) -> DecodeState:
    """The state between two steps, as shapes where the engine puts them."""
    shapes = jax.eval_shape(
        lambda method, *arguments: method.prefill(*arguments, capacity=capacity),
        *(method, params, tokens, lengths, requests),
    )

    def begun() -> DecodeState:
        # Made where it is to lie: as an argument the state would have to fit on each device whole.
        return jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes).placed()

    places = jax.jit(begun).lower().compile().output_shardings
    return jax.tree.map(
        lambda x, place: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), shapes, places
    )
