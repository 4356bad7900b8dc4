"""What `pods` found, as JSON."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from mtd_jax import parameters
from mtd_jax.config import ModelConfig
from mtd_jax.evaluation.pods import Compiled, Topology
from mtd_jax.evaluation.program_cost import KINDS
from mtd_jax.transformer.model import declare

_BYTES = 2  # of a weight in bfloat16, as the programs gather it


def to_json(programs: Sequence[Compiled], model: ModelConfig, topology: Topology) -> dict[str, Any]:
    """Everything that is known, sizes in bytes, times in seconds, all of one device."""
    count = parameters.count(declare(model))
    chip = topology.chip
    return {
        "topology": topology.name,
        "devices": len(topology.devices),
        "chip": {
            "name": chip.name,
            "flops": chip.flops,
            "hbm": chip.hbm_bytes,
            "hbm_bandwidth": chip.hbm_bandwidth,
            "ring_bandwidth": chip.ring_bandwidth,
        },
        "parameters": count,
        "parameter_bytes": _BYTES * count,
        "programs": [_program(p) for p in programs],
    }


def _program(found: Compiled) -> dict[str, Any]:
    row: dict[str, Any] = {
        "name": found.name,
        "mesh": found.mesh,
        "fits": found.fits,
        "bytes": found.total,
    }
    if found.cost is None or found.roofline is None:
        return {**row, "reason": found.reason}
    by_kind = {}
    for kind in KINDS:
        those = [c for c in found.cost.collectives.values() if c.kind == kind]
        if those:
            by_kind[kind] = {
                "count": sum(c.count for c in those),
                "bytes": sum(c.count * c.size for c in those),
                "largest": max(c.largest for c in those),
            }
    return {
        **row,
        "arguments": found.arguments,
        "temporaries": found.temporaries,
        "flops": found.cost.flops,
        "model_flops": found.model_flops,
        "hbm_traffic": found.cost.hbm_bytes,
        "sent": found.cost.ici_bytes,
        "sent_between_slices": found.cost.slices_bytes,
        "collectives": by_kind,
        "largest_gather": found.largest_gather,
        "gathered_stacks": found.gathered_stacks,
        "seconds": {
            **dataclasses.asdict(found.roofline),
            "step": found.roofline.step,
            "overlapped": found.roofline.overlapped,
        },
        "compiler_seconds": found.compiler_seconds,
        "mfu": found.mfu,
    }
