"""What a compiled program costs each device: products, memory traffic, exchanges.

The compiler's own `cost_analysis` counts the body of a loop once. Here a body counts as often as it
runs (`hlo.Program.trips`; once, where only the run decides, as for a decode loop: the cost is then
that of a step), and of the branches of a conditional, or of `speculative.in_place_switch`, the one
with the most products counts.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Mapping
from typing import Literal, TypeAlias

from mtd_jax.decoding.speculative import ONE_OF
from mtd_jax.evaluation.hlo import ArrayShape, Instruction, Program, parse

Kind: TypeAlias = Literal[
    "all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute"
]
KINDS: tuple[Kind, ...] = (
    "all-gather",
    "all-reduce",
    "reduce-scatter",
    "all-to-all",
    "collective-permute",
)
_FREE = frozenset(
    "parameter constant tuple get-tuple-element bitcast while conditional call after-all iota "
    "partition-id replica-id optimization-barrier".split()
)
_SLICES = ("dynamic-slice", "gather", "slice")
_UPDATES = {"dynamic-update-slice": 1, "scatter": 2}  # opcode -> which operand is written
_IS_ALTERNATIVE = re.compile(rf'op_name="[^"]*/{ONE_OF}/while"')
_BETWEEN_SLICES = "xla_megascale_runtime"
_THROUGH = ("bitcast", "reshape", "get-tuple-element", "convert", "copy", "transpose")


@dataclasses.dataclass(frozen=True)
class Collective:
    """Devices exchanging arrays at one place of the program."""

    kind: Kind
    size: int
    """Bytes of the whole array on a device: gathered, summed, or before it is scattered."""
    largest: int
    """Bytes of the largest array of it."""
    elements: int
    """Numbers in that array."""
    group: int
    """Devices that take part in one exchange."""
    count: int = 1
    """How often it runs."""

    @property
    def traffic(self) -> float:
        """Bytes that a device sends each time, around a ring."""
        passes = 2.0 if self.kind == "all-reduce" else 1.0
        share = 1.0 if self.kind == "collective-permute" else (self.group - 1) / self.group
        return passes * share * self.size


@dataclasses.dataclass
class Cost:
    """Of one device; `collectives` by channel, because a split one shows up in several pieces."""

    flops: float = 0.0
    """Of matrix products (2 for each multiplication and addition)."""
    hbm_bytes: float = 0.0
    """Read and written in its memory, an estimate: operands and results of each kernel."""
    collectives: dict[str, Collective] = dataclasses.field(default_factory=dict)
    slices_bytes: float = 0.0
    """Handed to the host for other slices; what its runtime makes of a sum is not in the text."""

    def add(self, other: Cost, times: int = 1) -> None:
        """Adds what runs so many times."""
        self.flops += times * other.flops
        self.hbm_bytes += times * other.hbm_bytes
        self.slices_bytes += times * other.slices_bytes
        for channel, found in other.collectives.items():
            self.collectives[channel] = dataclasses.replace(found, count=times * found.count)

    @property
    def ici_bytes(self) -> float:
        """Bytes that a device sends."""
        return sum(c.count * c.traffic for c in self.collectives.values())


def program_cost(text: str) -> Cost:
    """The cost of a program, given as HLO text.

    Raises:
      ValueError: it is none.
    """
    program = parse(text)
    known: dict[str, Cost] = {}

    def of(computation: str, *, fused: bool) -> Cost:
        if computation not in known:
            total, alternatives = Cost(), [Cost()]
            for instruction in program.computations.get(computation, {}).values():
                marked = _IS_ALTERNATIVE.search(instruction.attributes)
                if marked and instruction.opcode == "while":
                    alternatives.append(of(_body(instruction), fused=False))
                else:
                    _count(program, computation, instruction, total, fused)
            total.add(max(alternatives, key=_size))
            known[computation] = total
        return known[computation]

    def _count(
        program: Program, where: str, instruction: Instruction, total: Cost, fused: bool
    ) -> None:
        opcode = instruction.opcode
        if opcode == "while":
            total.add(of(_body(instruction), fused=False), program.trips(instruction) or 1)
            return
        if opcode == "conditional":
            found = [of(name, fused=False) for name in instruction.branches()]
            total.add(max(found, key=_size, default=Cost()))
            return
        called = instruction.called("calls")
        called = called or (instruction.called("to_apply") if opcode == "call" else None)
        if called is not None:
            total.add(of(called, fused=fused or opcode != "call"))
        if opcode == "send" and _BETWEEN_SLICES in instruction.attributes:
            total.slices_bytes += instruction.results[0].size
        if opcode in ("convolution", "dot"):
            total.flops += _products(program, where, instruction)
        collective = _collective(program, where, instruction)
        if collective is not None:
            channel = re.search(r"channel_id=(\d+)", instruction.attributes)
            # Those of `shard_map` all have channel 1, hence kind and size.
            place = f"{channel[1]} {collective.kind} {collective.size}" if channel else ""
            total.collectives[place or instruction.name] = collective
        elif not fused and opcode not in _FREE and not opcode.endswith("-done"):
            total.hbm_bytes += _traffic(program, where, instruction)

    return of(program.entry, fused=False)


def _size(cost: Cost) -> tuple[float, float]:
    return cost.flops, cost.hbm_bytes


def _body(loop: Instruction) -> str:
    body = loop.called("body")
    assert body is not None
    return body


def _shapes(program: Program, where: str, name: str) -> tuple[ArrayShape, ...]:
    found = program.computations[where].get(name)
    return found.results if found else ()


def _collective(program: Program, where: str, instruction: Instruction) -> Collective | None:
    kind = instruction.opcode.removesuffix("-start")
    if kind not in KINDS:
        return None
    results = instruction.results
    operands = [s for name in instruction.operands for s in _shapes(program, where, name)]
    if kind == "all-reduce" and "all-reduce-scatter" in where:
        kind = "reduce-scatter"  # the TPU compiler's form: a sum of which each keeps its slice
    elif kind == "reduce-scatter" and operands:
        results = tuple(operands)
    elif instruction.opcode != kind and kind in ("all-gather", "collective-permute"):
        results = results[len(results) // 2 :]  # (operands, results)
    sizes = [shape.size for shape in results]
    counts = [math.prod(shape.dims) for shape in results]
    return Collective(
        kind=next(k for k in KINDS if k == kind),
        size=sum(sizes),
        largest=max(sizes, default=0),
        elements=max(counts, default=0),
        group=_group(instruction.attributes),
    )


def _group(attributes: str) -> int:
    """Devices of one group, from the three ways that HLO writes them."""
    mesh = re.search(r"replica_groups=mesh\[([^\]]*)\].*?\{([^}]*)\}", attributes)
    if mesh:
        sizes = dict(re.findall(r"'(\w+)'=(\d+)", mesh[1]))
        return math.prod(int(sizes[name]) for name in re.findall(r"'(\w+)'", mesh[2]))
    grid = re.search(r"replica_groups=\[\d+,(\d+)\]", attributes)
    if grid:
        return int(grid[1])
    listed = re.search(r"replica_groups=\{\{([\d,]*)\}", attributes)
    return len(listed[1].split(",")) if listed else 2


def _products(program: Program, where: str, instruction: Instruction) -> float:
    """Operations of a matrix product; TPU programs write them as convolutions."""
    left, right = (_shapes(program, where, name)[0].dims for name in instruction.operands[:2])
    out = instruction.results[0].dims
    if instruction.opcode == "dot":
        contracted = re.search(r"lhs_contracting_dims=\{([\d,]*)\}", instruction.attributes)
        inner = [left[int(d)] for d in contracted[1].split(",") if d] if contracted else []
        return 2.0 * math.prod(out) * math.prod(inner)
    labels = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", instruction.attributes)
    assert labels is not None
    window = dict(re.findall(r"(\w+)=([\dx_\-]+)", instruction.attributes.partition("}")[0]))
    rows, columns = out[labels[3].index("b")], out[labels[3].index("f")]
    total = 2.0 * rows * columns * right[labels[2].index("i")]
    for axis, digit in enumerate(sorted(x for x in labels[3] if x.isdigit())):
        total *= _meetings(
            left[labels[1].index(digit)],
            right[labels[2].index(digit)],
            out[labels[3].index(digit)],
            {name: value.split("x")[axis] for name, value in window.items()},
        )
    return total


def _meetings(size: int, kernel: int, out: int, window: dict[str, str]) -> int:
    """Pairs of output and kernel places that meet a real input: padding is no work."""
    stride, dilation = int(window.get("stride", 1)), int(window.get("lhs_dilate", 1))
    spread, before = int(window.get("rhs_dilate", 1)), int(window.get("pad", "0_0").split("_")[0])
    places = (o * stride + k * spread - before for o in range(out) for k in range(kernel))
    return sum(0 <= p <= (size - 1) * dilation and p % dilation == 0 for p in places)


def _traffic(program: Program, where: str, instruction: Instruction) -> float:
    """Bytes of memory that a kernel reads and writes; of what it slices, the slice."""
    results = instruction.results
    opcode = instruction.opcode
    if opcode.endswith("-start"):  # into or out of on-chip memory
        sizes = [s.size for s in results if len(s.dims) > 1 or s.size > 64]
        return float(min(sizes, default=0))
    written = _in_hbm(results)
    if opcode in _SLICES:
        return 2.0 * written
    if opcode in _UPDATES:
        place = _UPDATES[opcode]
        return 2.0 * _in_hbm(_shapes(program, where, instruction.operands[place]))
    inner = instruction.called("calls") if opcode == "fusion" else None
    if inner is None:
        return written + sum(_in_hbm(_shapes(program, where, n)) for n in instruction.operands)
    body = program.computations[inner]
    # A kernel may drive an exchange on its side; those buffers are the network's, not its own.
    exchanged = _exchanged(program, inner, body)
    results = tuple(s for s in results if (s.dtype, s.dims) not in exchanged)
    by_number = {int(x.arguments): x.name for x in body.values() if x.opcode == "parameter"}
    read = 0.0
    updated: set[ArrayShape] = set()
    for number, name in enumerate(instruction.operands):
        shapes = _shapes(program, where, name)
        shapes = tuple(s for s in shapes if (s.dtype, s.dims) not in exchanged)
        sliced, is_updated = _sliced(program, body, by_number.get(number, ""))
        if is_updated:
            updated.update(shapes)
        whole = _in_hbm(shapes)
        read += whole if sliced is None else min(whole, sliced)
    # A buffer that is updated in place comes back as a result: only the update is written.
    written = _in_hbm(tuple(s for s in results if (s.dtype, s.dims) not in _kinds(updated)))
    return read + written


def _exchanged(
    program: Program, where: str, body: Mapping[str, Instruction]
) -> set[tuple[str, tuple[int, ...]]]:
    found: set[ArrayShape] = set()
    for instruction in body.values():
        if _collective(program, where, instruction) is not None:
            found.update(instruction.results)
            for name in instruction.operands:
                found.update(_shapes(program, where, name))
    return _kinds(found)


def _kinds(shapes: set[ArrayShape]) -> set[tuple[str, tuple[int, ...]]]:
    return {(s.dtype, s.dims) for s in shapes}


def _sliced(
    program: Program, body: Mapping[str, Instruction], name: str
) -> tuple[float | None, bool]:
    """(bytes, whether it is updated in place), if a parameter is only sliced or updated."""
    total, updated = 0.0, False
    names = [name]
    while names:
        name = names.pop()
        for user in body.values():
            if name not in user.operands:
                continue
            if user.opcode in _SLICES and user.operands[0] == name:
                total += sum(s.size for s in user.results)
            elif user.opcode in _UPDATES and user.operands[0] == name:
                update = body.get(user.operands[_UPDATES[user.opcode]])
                total += sum(s.size for s in update.results) if update else 0
                updated = True
            elif user.opcode in _THROUGH:
                names.append(user.name)
            elif user.opcode == "fusion" and (called := user.called("calls")):
                inside = program.computations[called]
                number = str(user.operands.index(name))
                inner = [
                    x.name
                    for x in inside.values()
                    if (x.opcode, x.arguments) == ("parameter", number)
                ]
                sliced, also = _sliced(program, inside, inner[0])
                if sliced is None:
                    return None, False
                total, updated = total + sliced, updated or also
            else:
                return None, False
    return total, updated


def _in_hbm(shapes: tuple[ArrayShape, ...]) -> float:
    return float(sum(s.size for s in shapes if s.in_hbm))
