"""Reading costs out of compiled programs: a TPU program's text, and programs compiled here."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from mtd_jax.decoding.speculative import in_place_switch
from mtd_jax.evaluation.chips import CHIPS, Roofline
from mtd_jax.evaluation.hlo import parse
from mtd_jax.evaluation.program_cost import Collective, Cost, program_cost
from mtd_jax.sharding import make_mesh

# As the TPU compiler writes it: one gather split over two kernels (same channel), a sum of which
# each device keeps its slice, a product as a convolution, S(1) for on-chip memory, no trip counts.
TPU = """\
HloModule jit_step, is_scheduled=true

%async_collective_fusion.1 (p.0: bf16[4,8], p.1: bf16[16,8]) -> bf16[64,8] {
  %p.0 = bf16[4,8]{1,0:T(8,128)(2,1)} parameter(0)
  %p.1 = bf16[16,8]{1,0:T(8,128)(2,1)S(1)} parameter(1)
  %gather.1 = bf16[64,8]{1,0:T(8,128)(2,1)} all-gather(%p.0), channel_id=7, \
replica_groups=mesh['axis_0'=16,'axis_1'=16] {'axis_1'}, dimensions={0}
  ROOT %product.1 = bf16[16,64]{1,0:T(8,128)(2,1)S(1)} convolution(%p.1, %gather.1), \
dim_labels=bf_oi->bf
}

%async_collective_fusion.2 (p.2: bf16[4,8]) -> bf16[64,8] {
  %p.2 = bf16[4,8]{1,0:T(8,128)(2,1)} parameter(0)
  ROOT %gather.2 = bf16[64,8]{1,0:T(8,128)(2,1)} all-gather(%p.2), channel_id=7, \
replica_groups=mesh['axis_0'=16,'axis_1'=16] {'axis_1'}, dimensions={0}
}

%all-reduce-scatter.1 (input: bf16[64,8]) -> bf16[4,8] {
  %input = bf16[64,8]{1,0:T(8,128)(2,1)} parameter(0)
  %sum = bf16[64,8]{1,0:T(8,128)(2,1)} all-reduce(%input), channel_id=9, \
replica_groups={{0,1,2,3},{4,5,6,7}}, to_apply=%add
  ROOT %slice = bf16[4,8]{1,0:T(8,128)(2,1)} slice(%sum), slice={[0:4], [0:8]}
}

%body (state: (s32[], bf16[4,8], /*index=2*/bf16[16,8])) -> (s32[], bf16[4,8], bf16[16,8]) {
  %state = (s32[]{:T(128)}, bf16[4,8]{1,0}, /*index=2*/bf16[16,8]{1,0}) parameter(0)
  %w = bf16[4,8]{1,0} get-tuple-element(%state), index=1
  %x = bf16[16,8]{1,0} get-tuple-element(%state), index=2
  %first = bf16[16,64]{1,0:S(1)} fusion(%w, %x), kind=kCustom, calls=%async_collective_fusion.1
  %second = bf16[64,8]{1,0} fusion(%w), kind=kCustom, calls=%async_collective_fusion.2
  %third = bf16[4,8]{1,0} fusion(%second), kind=kCustom, calls=%all-reduce-scatter.1
  ROOT %next = (s32[], bf16[4,8], bf16[16,8]) tuple(%state, %third, %x)
}

%condition (counter: (s32[], bf16[4,8], bf16[16,8])) -> pred[] {
  %bound = s32[]{:T(128)} constant(36)
  %counter = (s32[]{:T(128)}, bf16[4,8]{1,0}, bf16[16,8]{1,0}) parameter(0)
  %i = s32[]{:T(128)} get-tuple-element(%counter), index=0
  ROOT %lt = pred[]{:T(512)} compare(%i, %bound), direction=LT
}

ENTRY %main (a: (s32[], bf16[4,8], bf16[16,8])) -> f32[] {
  %a = (s32[]{:T(128)}, bf16[4,8]{1,0}, bf16[16,8]{1,0}) parameter(0)
  %loop = (s32[], bf16[4,8], bf16[16,8]) while(%a), condition=%condition, body=%body
  %loss = f32[]{:T(128)} constant(0)
  ROOT %total = f32[]{:T(128)} all-reduce(%loss), channel_id=11, replica_groups=[16,16]<=[256], \
to_apply=%add
}
"""


def test_a_tpu_program() -> None:
    cost = program_cost(TPU)
    assert cost.collectives == {
        "7 all-gather 1024": Collective("all-gather", 1024, 1024, 512, group=16, count=36),
        "9 reduce-scatter 1024": Collective("reduce-scatter", 1024, 1024, 512, group=4, count=36),
        "11 all-reduce 4": Collective("all-reduce", 4, 4, 1, group=16, count=1),
    }
    assert cost.flops == 36 * 2 * 16 * 64 * 8
    assert cost.ici_bytes == 36 * 1024 * (15 / 16 + 3 / 4) + 2 * 4 * 15 / 16


def test_no_program_is_an_error() -> None:
    with pytest.raises(ValueError, match="no ENTRY"):
        parse("HloModule nothing")


@pytest.mark.parametrize(
    ("size", "out", "pad", "meetings"), [(3, 3, "1_0", 5), (2, 1, "0_0", 2), (2, 3, "1_1", 4)]
)
def test_padding_of_a_convolution_is_no_work(size: int, out: int, pad: str, meetings: int) -> None:
    """A kernel of two places: output and kernel meet an input, or only padding."""
    text = f"""\
ENTRY %main (a: f32[5,{size},4], b: f32[2,4,7]) -> f32[5,{out},7] {{
  %a = f32[5,{size},4]{{2,1,0}} parameter(0)
  %b = f32[2,4,7]{{2,1,0}} parameter(1)
  ROOT %c = f32[5,{out},7]{{2,1,0}} convolution(%a, %b), window={{size=2 pad={pad}}}, \
dim_labels=b0f_0io->b0f
}}
"""
    assert program_cost(text).flops == 2 * 5 * 7 * 4 * meetings


def test_loops_and_collectives_of_programs_compiled_here() -> None:
    """Six layers of weights split over eight devices: one gather a layer, six times."""
    mesh = make_mesh({"fsdp": 8})
    layers, width, rows = 6, 64, 16

    def run(x: jax.Array, weights: jax.Array) -> jax.Array:
        def layer(x: jax.Array, w: jax.Array) -> tuple[jax.Array, None]:
            w = jax.lax.with_sharding_constraint(w, NamedSharding(mesh, PartitionSpec()))
            return jnp.tanh(x @ w), None

        return jax.lax.scan(layer, x, weights)[0]

    def abstract(shape: tuple[int, ...], *axes: str | None) -> jax.ShapeDtypeStruct:
        place = NamedSharding(mesh, PartitionSpec(*axes))
        return jax.ShapeDtypeStruct(shape, jnp.float32, sharding=place)

    x, weights = abstract((rows, width), "fsdp"), abstract((layers, width, width), None, "fsdp")
    text = jax.jit(run).lower(x, weights).compile().as_text()
    assert text is not None
    cost = program_cost(text)
    gathers = [c for c in cost.collectives.values() if c.kind == "all-gather"]
    assert sum(c.count for c in gathers) == layers
    assert {c.largest for c in gathers} == {4 * width * width}
    assert {c.group for c in gathers} == {8}
    assert cost.flops == layers * 2 * (rows // 8) * width * width


def test_of_loops_of_which_one_runs_the_largest_counts() -> None:
    """Beside what runs always, itself a loop that only the run ends."""
    width = 32

    def times(rows: int) -> Callable[[jax.Array], jax.Array]:
        return lambda x: jnp.tile(x[:rows] @ x, (width // rows, 1))

    def run(x: jax.Array, index: jax.Array) -> jax.Array:
        def step(x: jax.Array) -> jax.Array:
            found = in_place_switch(index, [times(8), times(16), times(4)], x)
            return jnp.tanh(found @ x)

        return jax.lax.while_loop(lambda x: x.sum() < 1.0, step, x)

    text = jax.jit(run).lower(jnp.ones((width, width)), jnp.int32(0)).compile().as_text()
    assert text is not None
    assert program_cost(text).flops == 2 * (16 + width) * width * width


def test_the_roofline_adds_what_does_not_hide() -> None:
    chip = CHIPS["v5e"]
    cost = Cost(flops=chip.flops, hbm_bytes=2 * chip.hbm_bandwidth)
    cost.collectives["1"] = Collective("collective-permute", int(9e10), int(9e10), 1, 2, count=3)
    found = Roofline.of(cost, chip)
    assert (found.compute, found.memory, found.network) == (1, 2, 3)
    assert (found.step, found.overlapped) == (5, 3)
