"""The same models on eight simulated devices: same logits, same tokens, no surprising traffic.

What the compiled decode loop may send between devices:

- `data`: no weight at all. Small things only: tokens, the new rows of keys and values, flags.
- `tensor`: no weight either; sums of activations (all-reduce) and pieces of the logits.
- `fsdp`: weights lie split along the model's width and are gathered where they are used, one
  matrix of one layer at a time, as far as `tensor` does not split it. Never the [L, ...] stack; and
  neither the embedding nor the head, which are larger than a layer's matrices: rows of activations
  are exchanged instead, because a step has far fewer of them than the width has columns.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
import re
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import mtd_jax as mtd
from mtd_jax.decoding import engine
from mtd_jax.decoding.method import DecodeState, Method, Requests
from mtd_jax.decoding.prompt import read_prompt
from mtd_jax.decoding.sampling import Sampling, SamplingRows
from mtd_jax.sharding import make_mesh, parse_mesh, partition, shardings
from mtd_jax.transformer import model as transformer
from mtd_jax.transformer.cache import KVCache
from tests.support import hf, tiny

MESHES = (
    "data=8",
    "fsdp=8",
    "tensor=8",
    "data=2,tensor=4",
    "data=2,fsdp=2,tensor=2",
    "fsdp=4,tensor=2",
    "tensor=2",
)
# Sizes that every mesh divides; sizes of which some divide; next to none, as in SmolLM2; and one
# head of keys and values, which no mesh divides, for many of queries.
SIZES: dict[str, dict[str, Any]] = {
    "all-divide": {"num_attention_heads": 8, "num_key_value_heads": 8, "head_dim": 8},
    "two-kv-heads": {"num_attention_heads": 8, "num_key_value_heads": 2, "head_dim": 16},
    "three-kv-heads": {
        "hidden_size": 90,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "head_dim": 10,
        "intermediate_size": 100,
        "vocab_size": 131,
    },
    "one-kv-head": {"num_attention_heads": 8, "num_key_value_heads": 1, "head_dim": 16},
}
MANY_HEADS = [sizes for sizes in SIZES if sizes != "one-kv-head"]
LOGITS = 1e-4
KL = 0.015
NEW_TOKENS = 8
TEXTS = hf.prompt(rows=8).astype(np.int32)
AR = mtd.methods.autoregressive()


def _rows() -> Iterator[tuple[str, ...]]:
    for family in hf.FAMILIES:
        yield from itertools.product(
            (family,), SIZES, hf.TIED, hf.ROPES, hf.WINDOWS[family], MESHES
        )


@cache
def _chosen() -> tuple[tuple[str, ...], ...]:
    rows = list(_rows())
    return tuple(rows[i] for i in hf.pairwise(rows))


def _variant(family: str, sizes: str, tied: str, rope: str, window: str) -> hf.Variant:
    changes = {
        **SIZES[sizes],
        **hf.TIED[tied],
        **hf.ROPES[rope],
        **hf.WINDOWS[family][window],
    }
    return hf.Variant("", family, changes)


@pytest.mark.torch
@pytest.mark.slow
@pytest.mark.parametrize(
    ("family", "sizes", "tied", "rope", "window", "mesh"),
    [pytest.param(*row, id="-".join(row)) for row in _chosen()],
)
def test_logits_are_those_of_transformers(
    tmp_path: Path, family: str, sizes: str, tied: str, rope: str, window: str, mesh: str
) -> None:
    """Every pair of family, sizes, tied, rotary embedding, window and mesh occurs."""
    hf.save_reference(tmp_path, _variant(family, sizes, tied, rope, window))
    expected = hf.logits(hf.load_reference(tmp_path), TEXTS)
    model = mtd.load(tmp_path, mesh=make_mesh(parse_mesh(mesh)))
    ours = np.asarray(mtd.logits(model, TEXTS))
    assert np.abs(ours - expected).max() <= LOGITS


PROMPTS = [hf.prompt(length=n, seed=n)[0].tolist() for n in (3, 40, hf.PROMPT_TOKENS, 17, 100)]


@cache
def _checkpoint(directory: Path, family: str, sizes: str) -> tuple[Path, list[tuple[int, ...]]]:
    """A checkpoint and its tokens without a mesh, made once for all meshes."""
    path = directory / f"{family}-{sizes}"
    rope = {"llama": "llama3", "mistral": "yarn", "qwen2": "default", "qwen3": "dynamic"}[family]
    window = list(hf.WINDOWS[family])[-1]
    tied = "tied" if sizes == "three-kv-heads" else "untied"
    hf.save_reference(path, _variant(family, sizes, tied, rope, window))
    return path, _tokens(mtd.load(path))


def _tokens(
    model: mtd.LanguageModel, method: Method = AR, prompts: list[list[int]] | None = None
) -> list[tuple[int, ...]]:
    done = mtd.generate(
        model,
        method,
        prompts or PROMPTS,
        max_new_tokens=NEW_TOKENS,
        batch_size=len(PROMPTS),
        ignore_eos=True,
    )
    return [c.token_ids for c in done]


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("checkpoints")


def _generations() -> list[Any]:
    """Every mesh with every kind of sizes (one head on one mesh alone), families in turn."""
    families = itertools.cycle(hf.FAMILIES)
    pairs = [*itertools.product(MANY_HEADS, MESHES), ("one-kv-head", "data=2,tensor=4")]
    rows = [(next(families), sizes, mesh) for sizes, mesh in pairs]
    return [pytest.param(*row, id="-".join(row)) for row in rows]


@pytest.mark.torch
@pytest.mark.slow
@pytest.mark.parametrize(("family", "sizes", "mesh"), _generations())
def test_a_ragged_batch_gives_the_tokens_of_one_device(
    checkpoints: Path, family: str, sizes: str, mesh: str
) -> None:
    """523 tokens beside three: chunks, padding rows (the mesh divides no batch of 5), windows."""
    path, expected = _checkpoint(checkpoints, family, sizes)
    assert len(set(expected)) == len(PROMPTS)
    assert _tokens(mtd.load(path, mesh=make_mesh(parse_mesh(mesh)))) == expected


def _one_of_each() -> list[Any]:
    """Every mesh once; families and kinds of sizes in turn (no two of the seven are the same)."""
    rows = zip(itertools.cycle(hf.FAMILIES), itertools.cycle(MANY_HEADS), MESHES, strict=False)
    return [pytest.param(*row, id="-".join(row)) for row in rows]


@cache
def _reference(directory: Path, family: str, sizes: str) -> tuple[Path, dict[str, np.ndarray]]:
    """A checkpoint and what transformers computes of it in each dtype."""
    path = directory / f"{family}-{sizes}-reference"
    rope = {"llama": "llama3", "mistral": "yarn", "qwen2": "default", "qwen3": "linear"}[family]
    tied = "tied" if sizes == "three-kv-heads" else "untied"
    hf.save_reference(path, _variant(family, sizes, tied, rope, list(hf.WINDOWS[family])[-1]))
    models = {dtype: hf.load_reference(path, dtype) for dtype in ("float32", "bfloat16")}
    return path, {dtype: hf.logits(model, TEXTS) for dtype, model in models.items()}


@pytest.mark.torch
@pytest.mark.slow
@pytest.mark.parametrize(("family", "sizes", "mesh"), _one_of_each())
def test_bfloat16_diverges_little(
    checkpoints: Path,
    family: str,
    sizes: str,
    mesh: str,
    record_property: Callable[[str, object], None],
) -> None:
    path, expected = _reference(checkpoints, family, sizes)
    model = mtd.load(path, dtype="bfloat16", mesh=make_mesh(parse_mesh(mesh)))
    assert model.params.embedding.dtype == "bfloat16"
    kl = hf.mean_kl(expected["bfloat16"], np.asarray(mtd.logits(model, TEXTS)))
    record_property("mean KL", kl)
    assert kl <= KL


@pytest.mark.torch
@pytest.mark.slow
@pytest.mark.parametrize(("family", "sizes", "mesh"), _one_of_each())
def test_logits_against_the_cache_are_those_of_transformers(
    checkpoints: Path, family: str, sizes: str, mesh: str
) -> None:
    """The text but its end is read as a prompt, the end token by token."""
    path, expected = _reference(checkpoints, family, sizes)
    model = mtd.load(path, mesh=make_mesh(parse_mesh(mesh)))
    assert model.mesh is not None
    with jax.set_mesh(model.mesh):
        ours = np.asarray(_decoded(model.params, TEXTS))
    assert np.abs(ours - expected["float32"][:, -NEW_TOKENS:]).max() <= LOGITS


@jax.jit
def _decoded(params: transformer.Parameters, tokens: jax.Array) -> jax.Array:
    """Logits [B, NEW_TOKENS, V] of the last tokens."""
    read = tokens.shape[1] - NEW_TOKENS
    lengths = jnp.full(tokens.shape[0], read, jnp.int32)
    _, cache = read_prompt(params, tokens[:, :read], lengths, capacity=1024)

    def step(cache: KVCache, column: jax.Array) -> tuple[KVCache, jax.Array]:
        x, cache = transformer.extend(params, cache, column[:, None])
        return cache.replace(length=cache.length + 1), transformer.unembed(params, x[:, 0])

    _, logits = jax.lax.scan(step, cache, tokens[:, read:].T)
    return logits.swapaxes(0, 1)


@pytest.mark.torch
@pytest.mark.slow
@pytest.mark.parametrize(
    ("mesh", "method"),
    [
        ("data=2,tensor=4", mtd.methods.ngram(branches="2x1")),
        ("fsdp=4,tensor=2", mtd.methods.ngram(drafts=3)),
        ("data=8", mtd.methods.self_speculative(skip_mlp="1", drafts=3)),
        ("tensor=2", mtd.methods.prompt_lookup(drafts=3)),
    ],
    ids=lambda value: value if isinstance(value, str) else value.name,
)
def test_drafting_gives_the_tokens_of_one_device(
    checkpoints: Path, mesh: str, method: Method
) -> None:
    path, expected = _checkpoint(checkpoints, "llama", "all-divide")
    model = mtd.load(path, mesh=make_mesh(parse_mesh(mesh)))
    prompts = [[*p, *p[-6:], *p[-6:]] for p in PROMPTS]
    plain = _tokens(mtd.load(path), AR, prompts)
    assert plain != expected
    assert _tokens(model, method, prompts) == plain


# Activations of the eight rows stay below the smallest matrix of a layer, and a layer's matrices
# below embedding and head, so that sizes alone tell what is gathered.
_BATCH = 8
_TRAFFIC = {
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
    r"= (?P<shapes>.+?) (?P<kind>all-gather|all-to-all|collective-permute)(-start)?\("
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
    """See the module's docstring; checked on the compiled program of the decode loop."""
    config = dataclasses.replace(_TRAFFIC[sizes], tie_embeddings=tied)
    devices = make_mesh(parse_mesh(mesh))
    matrices, vocabulary = _weights(config, devices)
    smallest = min(math.prod(whole) for whole, _ in matrices)
    allowed = smallest - 1
    if devices.shape["fsdp"] > 1:
        allowed = max(math.prod(gathered) for _, gathered in matrices)
        assert vocabulary > allowed
    assert _BATCH * config.vocab_size < smallest

    program = _decode_loop(config, devices, prepared=layout == "prepared")
    moved = [(size, line) for size, line in _collectives(program) if size > allowed]
    assert not moved, "\n".join(line for _, line in moved)


def _weights(
    config: Any, mesh: jax.sharding.Mesh
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


def _decode_loop(config: Any, mesh: jax.sharding.Mesh, *, prepared: bool) -> str:
    params = jax.device_put(tiny.params(config), shardings(mesh, transformer.declare(config)))
    if prepared:
        params = transformer.prepare_for_decoding(params)
        assert isinstance(params.blocks, tuple)
    requests = Requests(
        budget=jnp.full(_BATCH, 9, jnp.int32),
        stop_ids=jnp.full(8, -1, jnp.int32),
        sampling=SamplingRows.of([Sampling()] * _BATCH),
    )
    tokens = jnp.ones((_BATCH, 16), jnp.int32)
    lengths = jnp.full(_BATCH, 16, jnp.int32)
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


def _collectives(program: str) -> Iterator[tuple[int, str]]:
    """Elements of everything that a program gathers, exchanges or sends, and the line saying so."""
    for line in program.splitlines():
        found = _COLLECTIVE.search(line)
        if found:
            shapes = _SHAPE.findall(found["shapes"])
            sizes = [math.prod(int(n) for n in shape.split(",") if n) for shape in shapes]
            # An all-to-all has a tuple of pieces; the started form of a gather repeats its operand.
            yield (sum if found["kind"] == "all-to-all" else max)(sizes), line.strip()[:400]


def test_collectives_are_found() -> None:
    """The parser sees a gather of a weight when there is one."""
    mesh = make_mesh(parse_mesh("fsdp=8"))
    sharding = jax.sharding.NamedSharding(mesh, jax.P("fsdp", None))
    whole = jax.sharding.NamedSharding(mesh, jax.P())
    weight = jax.device_put(jnp.ones((64, 24)), sharding)
    program = _text(jax.jit(lambda w: w * 2.0, out_shardings=whole).lower(weight))
    assert [size for size, _ in _collectives(program)] == [64 * 24]
