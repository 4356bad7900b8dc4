"""Hidden Transfer is trained on the rows that it decodes with, and they change nothing else."""

from __future__ import annotations

import dataclasses
import functools
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mtd_jax import InputError, generate, load, load_heads, methods
from mtd_jax.convert.heads import save_heads, stored_heads
from mtd_jax.decoding import engine
from mtd_jax.decoding.heads import Heads
from mtd_jax.decoding.method import Requests
from mtd_jax.decoding.row_trees import in_rows
from mtd_jax.decoding.sampling import Sampling, SamplingRows
from mtd_jax.decoding.tree import TokenTree
from mtd_jax.methods.transfer import HiddenTransferSpec, TransferWeights, hidden_states
from mtd_jax.sharding import make_mesh
from mtd_jax.transformer.block import unstack
from mtd_jax.transformer.cache import KVCache
from mtd_jax.transformer.model import extend, unembed
from mtd_jax.transformer.packed import Packed
from tests.oracle import hidden_transfer as oracle
from tests.oracle import transformer as plain
from tests.support import heads, tiny
from tests.support.training import assert_same_bits, write_model

# Windows that end among the pseudo rows' own places, and steps that enter in any order.
MODEL = tiny.language_model(tiny.config(num_layers=4, sliding_windows=(None, 6, None, 2)))
OPTIONS: list[dict[str, Any]] = [
    {"layers": "2,1,3"},
    {"layers": "1,2,2", "chained": False, "loss": "cross_entropy", "decay": 0.5},
    {"count": 2, "rank": 4},
]
DOCUMENTS = ([5, 6, 7, 8, 9, 6, 5], [11, 12, 13, 20])
VOCAB = MODEL.config.vocab_size


def _heads(options: dict[str, Any]) -> Heads:
    """Random maps, small enough for pseudo rows to stay near the others."""
    found = heads.random(MODEL, "hidden_transfer", **options)
    weights = jax.tree.map(lambda w: w * 0.2, found.weights)
    return Heads(found.method, options, found.base, weights)


def _spec(options: dict[str, Any]) -> HiddenTransferSpec:
    spec = methods.make_spec("hidden_transfer", options)
    assert isinstance(spec, HiddenTransferSpec)
    return spec


def _maps(weights: TransferWeights) -> list[np.ndarray]:
    values = jax.tree.map(lambda w: np.asarray(w, np.float64), weights)
    maps = values.weight if values.weight is not None else values.down @ values.up
    return list(np.eye(maps.shape[-1]) + maps)


def _packed() -> Packed:
    """Both documents in a row, and padding."""
    batch = heads.packed([[*DOCUMENTS[0], *DOCUMENTS[1], 0]])
    first = len(DOCUMENTS[0])
    order = jnp.arange(batch.tokens.shape[1], dtype=jnp.int32)[None]
    real = order < order.shape[1] - 1
    segments = jnp.where(real, jnp.where(order < first, 1, 2), 0)
    positions = jnp.where(order < first, order, order - first)
    return batch.replace(
        segments=segments, positions=positions, answer=real, learn=real & (positions > 0)
    )


@functools.partial(jax.jit, static_argnames="spec")
def _loss_and_gradients(spec: HiddenTransferSpec, weights: Any, batch: Packed) -> Any:
    counts = spec.counts(batch)

    def loss(weights: Any, base: Any) -> Any:
        return spec.training_loss(weights, base, batch, counts, chunk=5)

    return jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)(weights, MODEL.params)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_training_is_that_of_the_oracle(options: dict[str, Any]) -> None:
    """The loss, document by document; and gradients exist for the maps alone."""
    spec, weights = _spec(options), _heads(options).weights
    way = spec.way(MODEL.config)
    sums, right, numbers = (np.zeros(spec.count) for _ in range(3))
    for document in DOCUMENTS:
        log_p = jax.nn.log_softmax(jnp.asarray(plain.logits(MODEL.params, document)))
        for n in range(len(document) - 2):
            said = oracle.pseudo_logits(
                MODEL.params, _maps(weights), list(way.layers), way.chained, document[: n + 1]
            )
            log_q = jax.nn.log_softmax(jnp.asarray(said))
            for i in range(min(spec.count, len(document) - n - 2)):
                wanted, target = log_p[n + i + 1], document[n + i + 2]
                if spec.loss == "distillation":
                    sums[i] += float((jnp.exp(wanted) * (wanted - log_q[i])).sum())
                    target = int(wanted.argmax())
                else:
                    sums[i] -= float(log_q[i, target])
                right[i] += int(log_q[i].argmax()) == target
                numbers[i] += 1
    (loss, totals), (own, others) = _loss_and_gradients(spec, weights, _packed())
    expected = sum(spec.decay**i * sums[i] / numbers[i] for i in range(spec.count))
    assert float(loss) == pytest.approx(expected, rel=1e-4)
    found = [float(totals[f"accuracy_{i + 1}"]) for i in range(spec.count)]
    np.testing.assert_allclose(found, right / numbers, atol=1e-6)
    assert all(float(jnp.abs(leaf).max()) > 0 for leaf in jax.tree.leaves(own))
    assert all(float(jnp.abs(leaf).max()) == 0 for leaf in jax.tree.leaves(others))


@functools.partial(jax.jit, static_argnames="spec")
def _trained_logits(spec: HiddenTransferSpec, weights: Any, batch: Packed) -> jax.Array:
    way = spec.way(MODEL.config)
    return unembed(MODEL.params, hidden_states(way, weights, MODEL.params, batch)[1])


def test_decoding_has_the_logits_of_training() -> None:
    """Behind prompts and behind steps, by both schedules, with layers stacked or unrolled."""
    options, depth = OPTIONS[0], 3
    found, spec = _heads(options), _spec(options)
    texts = [list(range(3, 12)), [40, 41, 40, 41, 40], [7] * 14]
    lengths = jnp.asarray([len(t) for t in texts], jnp.int32)
    tokens = jnp.asarray([t + [0] * (16 - len(t)) for t in texts], jnp.int32)
    requests = Requests(
        budget=jnp.full(3, 30, jnp.int32),
        stop_ids=jnp.full(8, -1, jnp.int32),
        sampling=SamplingRows.of([Sampling()] * 3),
    )
    blocks: Any = MODEL.params.blocks
    unrolled = MODEL.params.replace(blocks=unstack(blocks))
    tokens_of: list[Any] = []
    for schedule, params in (("accepted", unrolled), ("all", MODEL.params)):
        made = {"tree": "2x2x1", "pseudo": schedule}
        method: Any = methods.make_method("hidden_transfer", made, found)
        said = jax.jit(method.logits.__func__)
        state, _ = engine.start(method, params, tokens, lengths, requests, 128)
        for rounds in (0, 4):
            if rounds:
                state, _ = engine.run(method, params, state, rounds)
            text, length = np.asarray(state.text), np.asarray(state.cache.length)
            kept = [text[row, : length[row]].tolist() for row in range(3)]
            assert max(map(len, kept)) <= 24
            batch = heads.packed([[*t, *[0] * (24 - len(t))] for t in kept])
            expected = np.asarray(_trained_logits(spec, found.weights, batch))
            expected = expected[np.arange(3), length - 1]
            ours = np.asarray(said(method, params, state.extra.row, state.cache))
            np.testing.assert_allclose(ours, expected, atol=1e-4)
            best = np.asarray(state.extra.guesses)[:, :, 0]
            np.testing.assert_array_equal(best, expected.argmax(-1))
            carried = np.asarray(state.extra.row).reshape(3, -1, MODEL.config.hidden_size)[:, 4:]
            assert carried.shape[1] == (depth if schedule == "all" else 0)
            assert (np.abs(carried).max(initial=0) > 0) == (schedule == "all" and rounds > 0)
        tokens_of.append((kept, np.asarray(state.pending).tolist()))
    assert tokens_of[0] == tokens_of[1]


def test_pseudo_rows_leave_the_base_as_it_is() -> None:
    """To the last bit, whatever they hold; and nothing of them is in the cache."""
    tree = TokenTree.branching(2, 1)
    tokens = jnp.asarray([[3, 4, 5, 6, 7], [8, 9, 10, 11, 12]], jnp.int32)
    cache = KVCache.empty(MODEL.config, 2, 16, jnp.float32)
    _, cache = jax.jit(extend)(MODEL.params, cache, tokens)
    cache = cache.commit(jnp.asarray([5, 3], jnp.int32))

    @jax.jit
    def verify(method: Any) -> Any:
        ancestors = in_rows(tree).ancestors
        walked = method.walk(tree)(MODEL.params, cache, tokens, ancestors=ancestors)
        return walked[0][..., : MODEL.config.hidden_size], walked[1]

    found = _heads(OPTIONS[0])
    nothing = jax.tree.map(lambda w: w * jnp.nan, found.weights)
    options: dict[str, Any] = {"tree": "2x1", "pseudo": "all"}
    method: Any = methods.make_method("hidden_transfer", options, found)
    rows, written = verify(method)
    other = method.replace(weights=nothing.first(method.weights.count))
    assert_same_bits(verify(other), (rows, written))
    plain_walk = jax.jit(functools.partial(extend, ancestors=in_rows(tree).ancestors))
    expected, plainly = plain_walk(MODEL.params, cache, tokens)
    np.testing.assert_allclose(rows, expected, atol=1e-5)
    np.testing.assert_allclose(written.k, plainly.k, atol=1e-5)
    np.testing.assert_array_equal(written.k[..., 10:], 0)


@pytest.mark.slow
@pytest.mark.parametrize(("schedule", "vocabulary"), [("all", 0), ("accepted", 0), ("all", 64)])
def test_a_mesh_makes_the_same_guesses(tmp_path: Path, schedule: str, vocabulary: int) -> None:
    shape = {"num_heads": 8, "num_kv_heads": 4, "head_dim": 4, "intermediate_size": 64}
    path = write_model(tmp_path, num_layers=3, eos_token_ids=(), **shape)
    alone = load(path)
    prompts = [[7] * 6, [3, 4, 5, 6], [50, 40, 50, 40, 50], [9, 8, 7]]
    found = heads.fitted(alone, heads.answers(alone, prompts, 30)[:2], "hidden_transfer")
    if vocabulary:
        options = {**found.options, "vocabulary": vocabulary}
        record = {**found.record, "vocabulary": list(range(vocabulary))}
        found = dataclasses.replace(found, options=options, record=record)
    save_heads(found, tmp_path / "heads")
    done = []
    for model in (alone, load(path, mesh=make_mesh({"data": 2, "tensor": 2}))):
        mine = load_heads(tmp_path / "heads", model)
        decoding = {"tree": "2x1", "pseudo": schedule}
        method = methods.make_method("hidden_transfer", decoding, mine)
        completions = generate(model, method, prompts, max_new_tokens=30, batch_size=4)
        done.append([(c.token_ids, c.metrics.histogram) for c in completions])
    assert done[0] == done[1]
    assert sum(sum(histogram[1:]) for _, histogram in done[0]) > 0


def test_layers_below_store_nothing() -> None:
    """Nor do layers above store weights: pseudo rows and the text's, once for each layer."""

    def temporary(below: int, above: int) -> int:
        config = tiny.config(num_layers=below + above)
        base = jax.eval_shape(lambda: tiny.params(config))
        spec = _spec({"layers": str(below)})
        batch = jax.eval_shape(_packed)
        return heads.training_bytes(spec, base, batch, chunk=4)

    few, low, high = temporary(2, 2), temporary(12, 2), temporary(2, 12)
    row = _packed().tokens.size * MODEL.config.hidden_size * 4
    assert low - few < row
    assert high - few < 10 * 1.5 * row * (1 + 3)


@pytest.mark.parametrize("rank", [0, 4])
def test_maps_on_disk_come_back(tmp_path: Path, rank: int) -> None:
    made = heads.random(MODEL, "hidden_transfer", count=2, rank=rank)
    save_heads(made, tmp_path / "a")
    found = stored_heads(tmp_path / "a", MODEL)
    assert_same_bits(found.weights, made.weights)
    assert found.options == made.options


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"count": 0}, "count must be between 1 and 16"),
        ({"layers": "1,2"}, "one number, or 3 of them"),
        ({"layers": "one"}, "layers must be numbers like"),
        ({"layers": "1,,2"}, "layers must be numbers like"),
        ({"layers": "4"}, "between 1 and 3 in a model of 4"),
        ({"layers": "0"}, "between 1 and 3 in a model of 4"),
        ({"rank": -1}, "rank must be 0"),
        ({"rank": 32}, "under the model's width"),
        ({"decay": 2.0}, "decay must be over 0"),
    ],
    ids=str,
)
def test_no_model_has_such_maps(options: dict[str, Any], words: str) -> None:
    with pytest.raises(InputError, match=words):
        methods.make_spec("hidden_transfer", options).declare(MODEL.config)


def test_a_tree_deeper_than_the_maps_is_refused() -> None:
    found = heads.random(MODEL, "hidden_transfer", count=2)
    with pytest.raises(InputError, match="3 deep; the heads guess 2"):
        methods.make_method("hidden_transfer", {"tree": "1x1x1"}, found)
    with pytest.raises(InputError, match="all or accepted"):
        methods.make_method("hidden_transfer", {"pseudo": "none"}, found)
