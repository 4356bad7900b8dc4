"""What the compiled programs send between devices: nothing that could stay where it is.

- `data`: no weight at all. Small things only: tokens, the new rows of keys and values, flags.
- `tensor`: no weight either; sums of activations (all-reduce) and pieces of the logits.
- `fsdp`: weights lie split along the model's width and are gathered where they are used, one
  matrix of one layer at a time, as far as `tensor` does not split it. Never the [L, ...] stack; and
  neither the embedding nor the head, which are larger than a layer's matrices: rows of activations
  are exchanged instead, because a step has far fewer of them than the width has columns.

A sum over devices can put a weight together as well, of parts among zeros, and costs twice what
gathering it does. No sum may be as large as a matrix.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import re
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import pytest

import mtd_jax as mtd
from mtd_jax.config import ModelConfig
from mtd_jax.decoding import engine
from mtd_jax.decoding.method import DecodeState, Requests
from mtd_jax.decoding.sampling import Sampling, SamplingRows
from mtd_jax.sharding import make_mesh, parse_mesh, partition, shardings
from mtd_jax.transformer import model as transformer
from tests.support import tiny
from tests.support.meshes import MESHES

AR = mtd.methods.autoregressive()

# In a step, activations of the eight rows stay below the smallest matrix of a layer, and a layer's
# matrices below embedding and head, so that sizes alone tell what is moved.
_BATCH = 8
# What is read of a prompt is larger than a matrix, as it is in use. Its length tells it apart: a
# prime number that divides the size of no weight, but that of everything with a row a token.
_PROMPT = 17
_SIZES = {
    "all-divide": tiny.config(
        hidden_size=64,
        num_heads=16,
        num_kv_heads=8,
        head_dim=8,
        intermediate_size=160,
        vocab_size=800,
    ),
    "three-kv-heads": tiny.config(
        hidden_size=72,
        num_heads=9,
        num_kv_heads=3,
        head_dim=8,
        intermediate_size=120,
        vocab_size=600,
    ),
}
_COLLECTIVE = re.compile(
    r"= (?P<shapes>.+?) (?P<kind>all-gather|all-to-all|all-reduce|collective-permute)(-start)?\("
)
_SHAPE = re.compile(r"[a-z]\w*\[([\d,]*)\]")


@pytest.mark.slow
@pytest.mark.parametrize("mesh", MESHES)
@pytest.mark.parametrize(
    ("sizes", "tied", "layout"),
    [
        ("all-divide", False, "stacked"),
        ("all-divide", True, "prepared"),
        ("three-kv-heads", True, "stacked"),
    ],
)
def test_the_decode_loop_moves_no_weight_that_it_need_not(
    mesh: str, sizes: str, tied: bool, layout: str
) -> None:
    config = dataclasses.replace(_SIZES[sizes], tie_embeddings=tied)
    devices = make_mesh(parse_mesh(mesh))
    program = _decode_loop(config, devices, prepared=layout == "prepared")
    moved = list(_needless(program, config, devices))
    assert not moved, "\n".join(moved)


@pytest.mark.slow
@pytest.mark.parametrize("mesh", MESHES)
@pytest.mark.parametrize(("sizes", "tied"), [("all-divide", False), ("three-kv-heads", True)])
def test_reading_prompts_moves_no_weight_that_it_need_not(
    mesh: str, sizes: str, tied: bool
) -> None:
    config = dataclasses.replace(_SIZES[sizes], tie_embeddings=tied)
    devices = make_mesh(parse_mesh(mesh))
    moved = list(_needless(_reading(config, devices), config, devices, prompt=_PROMPT))
    assert not moved, "\n".join(moved)


def _needless(
    program: str, config: ModelConfig, mesh: jax.sharding.Mesh, prompt: int | None = None
) -> Iterator[str]:
    """Lines of a program that move something as large as a weight that could stay in its place.

    Args:
      prompt: a length of prompts by which arrays with a row a token are known; they may move.
    """
    matrices, vocabulary = _weights(config, mesh)
    wholes = [math.prod(whole) for whole, _ in matrices]
    parts = [math.prod(part) for _, part in matrices]
    allowed = min(wholes) - 1
    if mesh.shape["fsdp"] > 1:
        allowed = max(parts)
        assert vocabulary > allowed
    assert _BATCH * config.vocab_size < min(wholes)
    assert prompt is None or all(size % prompt for size in (*wholes, *parts, vocabulary))

    for kind, size, line in _collectives(program):
        has_tokens = prompt is not None and size % prompt == 0
        if not has_tokens and size > (min(parts) - 1 if kind == "all-reduce" else allowed):
            yield line


def _weights(
    config: ModelConfig, mesh: jax.sharding.Mesh
) -> tuple[list[tuple[tuple[int, ...], tuple[int, ...]]], int]:
    """Of each matrix of a layer: its shape, and its shape with all but `fsdp` applied.

    And the elements of the embedding with all but `fsdp` applied.
    """

    def gathered(weight: Any) -> tuple[int, ...]:
        spec = partition(mesh, weight.axes, weight.shape)
        entries = [(entry,) if isinstance(entry, str) else entry or () for entry in spec]
        parts = [math.prod(mesh.shape[a] for a in entry if a != "fsdp") for entry in entries]
        return tuple(size // n for size, n in zip(weight.shape, parts, strict=True))

    declared = transformer.declare(config)
    layers = [w for w in jax.tree.leaves(declared.blocks) if len(w.shape) > 2]
    matrices = [(w.shape[1:], gathered(w)[1:]) for w in layers]
    return matrices, math.prod(gathered(declared.embedding))


def _inputs(
    config: ModelConfig, mesh: jax.sharding.Mesh, length: int
) -> tuple[transformer.Parameters, jax.Array, jax.Array, Requests]:
    """Parameters on the mesh, and prompts of so many tokens."""
    params = jax.device_put(tiny.params(config), shardings(mesh, transformer.declare(config)))
    requests = Requests(
        budget=jnp.full(_BATCH, 9, jnp.int32),
        stop_ids=jnp.full(8, -1, jnp.int32),
        sampling=SamplingRows.of([Sampling()] * _BATCH),
    )
    tokens = jnp.ones((_BATCH, length), jnp.int32)
    return params, tokens, jnp.full(_BATCH, length, jnp.int32), requests


def _reading(config: ModelConfig, mesh: jax.sharding.Mesh) -> str:
    params, tokens, lengths, requests = _inputs(config, mesh, _PROMPT)
    with jax.set_mesh(mesh):
        return _text(engine.lower_start(AR, params, tokens, lengths, requests, 128))


def _decode_loop(config: ModelConfig, mesh: jax.sharding.Mesh, *, prepared: bool) -> str:
    params, tokens, lengths, requests = _inputs(config, mesh, 16)
    if prepared:
        params = transformer.prepare_for_decoding(params)
        assert isinstance(params.blocks, tuple)
    with jax.set_mesh(mesh):
        # Zeros, laid out as `start` leaves the state: it need not be compiled for that.
        start = functools.partial(engine.start, AR, capacity=128)
        shapes, _ = jax.eval_shape(start, params, tokens, lengths, requests)
        zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
        state = jax.jit(DecodeState.placed)(zeros)
        return _text(engine.lower_run(AR, params, state))


def _text(lowered: jax.stages.Lowered) -> str:
    text = lowered.compile().as_text()
    assert text is not None
    return text


def _collectives(program: str) -> Iterator[tuple[str, int, str]]:
    """Everything that a program gathers, sums, exchanges or sends: how, elements, and the line."""
    for line in program.splitlines():
        found = _COLLECTIVE.search(line)
        if not found:
            continue
        shapes = _SHAPE.findall(found["shapes"])
        sizes = [math.prod(int(n) for n in shape.split(",") if n) for shape in shapes]
        # An all-to-all has a tuple of pieces; others have one for each of several arrays (and the
        # started form of a gather repeats its operand).
        for size in [sum(sizes)] if found["kind"] == "all-to-all" else sizes:
            yield found["kind"], size, line.strip()[:400]


def test_collectives_are_found() -> None:
    """The parser sees a weight that is gathered, and one that is put together by a sum."""
    config, mesh = _SIZES["all-divide"], make_mesh(parse_mesh("fsdp=8"))
    whole = (config.intermediate_size, config.hidden_size)
    sharding = jax.sharding.NamedSharding(mesh, jax.P("fsdp", None))
    weight = jax.device_put(jnp.ones(whole), sharding)

    def summed(part: jax.Array) -> jax.Array:
        first = jax.lax.axis_index("fsdp") * part.shape[0]
        among_zeros = jax.lax.dynamic_update_slice_in_dim(jnp.zeros(whole), part, first, axis=0)
        return jax.lax.psum(among_zeros, "fsdp")

    replicated = jax.sharding.NamedSharding(mesh, jax.P())
    gather = jax.jit(lambda w: w * 2.0, out_shardings=replicated)
    split = jax.shard_map(
        summed, mesh=mesh, in_specs=jax.P("fsdp", None), out_specs=jax.P(), check_vma=False
    )
    for kind, function in {"all-gather": gather, "all-reduce": jax.jit(split)}.items():
        program = _text(function.lower(weight))
        assert [(k, n) for k, n, _ in _collectives(program)] == [(kind, math.prod(whole))]
        # Layers' matrices are gathered over `fsdp`.
        assert bool(list(_needless(program, config, mesh, _PROMPT))) == (kind == "all-reduce")
