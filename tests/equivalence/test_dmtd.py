"""Cached decoding in cycles is the training forward, teacher-forced on what was produced."""

from __future__ import annotations

import collections
import dataclasses
import itertools
from functools import cache, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mtd_jax import Completion, Prompt, Sampling, backend, generate, methods
from mtd_jax.config import Anchor, CycleConfig
from mtd_jax.decoding.clock import Clock
from mtd_jax.decoding.language_model import LanguageModel
from mtd_jax.decoding.method import Requests
from mtd_jax.decoding.sampling import SamplingRows, sample
from mtd_jax.errors import InputError
from mtd_jax.methods.cycles import PLAIN, cycle_hidden, places_in_cycle
from mtd_jax.transformer.cache import KVCache
from mtd_jax.transformer.model import forward, unembed
from mtd_jax.transformer.packed import Packed
from tests.oracle import dmtd as oracle
from tests.oracle import transformer
from tests.support import tiny

pytestmark = pytest.mark.filterwarnings("ignore:these weights were not trained")

LAYERS = 5
PROMPTS = [[3, 4, 5, 6, 3, 4, 5, 6, 3], [9, 8, 7, 6, 5, 4], [11], [7] * 20, [50, 40, 50]]
BUDGET = 19
TIE = 1e-4


@cache
def _model(**changes: Any) -> LanguageModel:
    return tiny.language_model(tiny.config(num_layers=LAYERS, eos_token_ids=(), **changes))


def _decode(method: Any, batch_size: int = 1, **options: Any) -> list[Completion]:
    model = options.pop("model", None) or _model()
    prompts = options.pop("prompts", PROMPTS)
    options = {"max_new_tokens": BUDGET} | options
    return generate(model, method, prompts, batch_size=batch_size, **options)


def _batch(text: list[int], prompt: int, cycle: int, anchor: Anchor) -> tuple[Packed, jax.Array]:
    """One document as training sees it, and its places."""
    order = np.arange(len(text), dtype=np.int32)[None]
    batch = Packed(
        tokens=jnp.asarray([text], jnp.int32),
        segments=jnp.ones_like(order),
        positions=jnp.asarray(order),
        answer=jnp.asarray(order >= prompt),
        learn=jnp.asarray(order >= prompt),
    )
    return batch, places_in_cycle(batch, cycle, anchor)


@jax.jit
def _unembedded(params: Any, x: jax.Array) -> jax.Array:
    return unembed(params, x)


def _teacher_forced(
    model: LanguageModel, text: list[int], prompt: int, cycle: int, **groups: Any
) -> np.ndarray:
    """[T, V] logits of the training forward; padded, so that few shapes are compiled."""
    padded = text + [0] * (-len(text) % 48)
    anchor = groups.pop("anchor")
    batch, places = _batch(padded, prompt, cycle, anchor)
    hidden = _hidden(model.params, batch, places, **groups)
    return np.asarray(_unembedded(model.params, hidden))[0, : len(text)]


_hidden = jax.jit(cycle_hidden, static_argnames=("early", "late", "remat"))


def _check(
    found: list[Completion], model: LanguageModel, prompts: list[list[int]], **groups: Any
) -> None:
    """Every token is the greedy choice of the training forward on the text before it."""
    for prompt, completion in zip(prompts, found, strict=True):
        text = [*prompt, *completion.token_ids]
        logits = _teacher_forced(model, text, len(prompt), **groups)
        rows = logits[len(prompt) - 1 : -1]
        chosen = rows[np.arange(len(rows)), list(completion.token_ids)]
        assert (rows.max(axis=1) - chosen < TIE).all(), rows.max(axis=1) - chosen


FAST = (("prompt", 0, 1, 3), ("sequence", 2, 2, 4))
SLOW = (("prompt", 2, 1, 1), ("sequence", 0, 2, 6), ("prompt", 0, 2, 2), ("sequence", 2, 1, 5))


@pytest.mark.parametrize(
    ("anchor", "early", "late", "cycle"),
    [*FAST, *(pytest.param(*case, marks=pytest.mark.slow) for case in SLOW)],
)
def test_decoding_is_the_training_forward(
    anchor: Anchor, early: int, late: int, cycle: int
) -> None:
    groups: dict[str, Any] = {"early": early, "late": late, "anchor": anchor}
    method = methods.dmtd(cycle=cycle, **groups)
    for batch_size in (1, 3) if cycle == 3 else (3,):
        found = _decode(method, batch_size)
        _check(found, _model(), PROMPTS, cycle=cycle, **groups)
        for completion, prompt in zip(found, PROMPTS, strict=True):
            first = -len(prompt) % cycle if anchor == "sequence" else 0
            steps = -(-(BUDGET - 1 - first) // cycle) + (first > 0)
            assert completion.metrics.forwards == 1 + steps


@pytest.mark.slow
@pytest.mark.parametrize(
    ("anchor", "early", "late"), list(itertools.product(("prompt", "sequence"), (0, 2), (1, 2)))
)
def test_every_cycle_in_every_grouping(anchor: Anchor, early: int, late: int) -> None:
    """Six rows of a batch have cycles of one to six: one program for all of them."""
    groups: dict[str, Any] = {"early": early, "late": late, "anchor": anchor}
    texts = [PROMPTS[i % len(PROMPTS)] for i in range(12)]
    cycles = [1 + i % 6 for i in range(12)]
    prompts = [
        Prompt(str(i), token_ids=tuple(text), cycle=cycle)
        for i, (text, cycle) in enumerate(zip(texts, cycles, strict=True))
    ]
    found = _decode(methods.dmtd(cycle=6, **groups), 6, prompts=prompts)
    for text, cycle, completion in zip(texts, cycles, found, strict=True):
        _check([completion], _model(), [text], cycle=cycle, **groups)


@pytest.mark.parametrize(("early", "late"), [(0, 2), (2, 1)])
@pytest.mark.parametrize("anchor", ["prompt", "sequence"])
def test_the_training_forward_is_the_paper(anchor: Anchor, early: int, late: int) -> None:
    text, prompt = [3, 4, 5, 6, 3, 4, 5, 9, 8, 7, 6, 5, 4, 11], 6
    for cycle in (1, 3, 4):
        batch, places = _batch(text, prompt, cycle, anchor)
        expected = oracle.places(len(text), prompt, cycle, anchor)
        assert places[0].tolist() == expected
        hidden = _hidden(_model().params, batch, places, early=early, late=late)
        logits = oracle.logits(_model().params, text, expected, early, late)
        np.testing.assert_allclose(
            np.asarray(_unembedded(_model().params, hidden))[0], logits, atol=2e-4
        )


def test_decoding_is_the_oracle() -> None:
    groups: dict[str, Any] = {"early": 1, "late": 2, "cycle": 3, "anchor": "prompt"}
    found = _decode(methods.dmtd(**groups), 3, max_new_tokens=11)
    for prompt, completion in zip(PROMPTS, found, strict=True):
        expected = oracle.greedy(_model().params, prompt, 11, **groups)
        assert list(completion.token_ids) == expected


def test_plain_rows_alone_are_the_plain_model() -> None:
    """A prompt without an answer is a plain decoder's; with cycle 1 all others are heads."""
    text = [3, 4, 5, 6, 3, 4, 5, 9]
    batch, places = _batch(text, len(text), 4, "prompt")
    assert (places == PLAIN).all()
    hidden = _hidden(_model().params, batch, places, early=0, late=2)
    expected = forward(_model().params, batch.tokens)
    np.testing.assert_allclose(_unembedded(_model().params, hidden), expected, atol=1e-4)
    _, heads = _batch(text, 0, 1, "sequence")
    assert (heads == 0).all()


def test_places_restart_at_documents_and_turns() -> None:
    """Two documents; the first has two turns of an assistant."""
    segments = np.array([[1] * 9 + [2] * 4 + [0]], np.int32)
    positions = np.array([[*range(9), *range(4), 0]], np.int32)
    answer = np.array([[0, 0, 1, 1, 1, 0, 1, 1, 1, 1, 1, 1, 1, 0]], bool)
    batch = Packed(
        tokens=jnp.zeros((1, 14), jnp.int32),
        segments=jnp.asarray(segments),
        positions=jnp.asarray(positions),
        answer=jnp.asarray(answer),
        learn=jnp.asarray(answer),
    )
    n = PLAIN
    found = places_in_cycle(batch, 2, "prompt")[0].tolist()
    assert found == [n, n, 0, 1, 0, n, 0, 1, 0, 0, 1, 0, 1, n]
    found = places_in_cycle(batch, 3, "sequence")[0].tolist()
    assert found == [0, 1, 2, 0, 1, 2, 0, 1, 2, 0, 1, 2, 0, 0]
    moved = places_in_cycle(batch, 3, "sequence", jnp.asarray([1], jnp.int32))[0].tolist()
    assert moved == [1, 2, 0, 1, 2, 0, 1, 2, 0, 1, 2, 0, 1, 1]


@pytest.mark.parametrize("anchor", ["prompt", "sequence"])
def test_documents_of_a_row_do_not_see_each_other(anchor: Anchor) -> None:
    texts = [[3, 4, 5, 6, 7, 8, 9], [11, 12, 13, 14, 15]]
    groups: dict[str, Any] = {"early": 1, "late": 2}
    alone = []
    for text in texts:
        batch, places = _batch(text, 3, 3, anchor)
        alone.append(np.asarray(_hidden(_model().params, batch, places, **groups))[0])
    joined = jax.tree.map(
        lambda *x: jnp.concatenate(x, axis=1), *[_batch(t, 3, 3, anchor)[0] for t in texts]
    )
    segments = jnp.asarray([[1] * len(texts[0]) + [2] * len(texts[1])], jnp.int32)
    joined = joined.replace(segments=segments)
    places = places_in_cycle(joined, 3, anchor)
    hidden = np.asarray(_hidden(_model().params, joined, places, **groups))[0]
    np.testing.assert_allclose(hidden, np.concatenate(alone), atol=1e-4)


@pytest.mark.parametrize(("anchor", "lossless"), [("prompt", False), ("sequence", True)])
def test_rows_of_a_batch_have_their_own_cycles(anchor: Anchor, lossless: bool) -> None:
    method: Any = methods.dmtd(cycle=4, early=1, late=2, anchor=anchor, lossless=lossless)
    wanted = [2, 4, 1, 3, None]
    prompts = [
        Prompt(str(i), token_ids=tuple(p), cycle=c)
        for i, (p, c) in enumerate(zip(PROMPTS, wanted, strict=True))
    ]
    together = _decode(method, 5, prompts=prompts)
    with Clock() as clock:
        again = _decode(method, 5, prompts=[dataclasses.replace(p, cycle=3) for p in prompts])
    assert clock.compilations == 0
    assert lossless or again[0].token_ids != together[0].token_ids
    for prompt, cycle, completion in zip(PROMPTS, wanted, together, strict=True):
        exact = method.replace(cycle=cycle or 4)
        (alone,) = _decode(exact, prompts=[prompt])
        assert completion.token_ids == alone.token_ids


@pytest.mark.parametrize("anchor", ["prompt", "sequence"])
@pytest.mark.parametrize("early", [0, 2])
def test_every_key_is_written_once(
    anchor: Anchor, early: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Counted in the running program, step by step."""
    written: collections.Counter[tuple[int, int, int]] = collections.Counter()
    write = KVCache.write

    def count(layer: np.ndarray, slots: np.ndarray, capacity: int) -> None:
        for row, places in enumerate(np.asarray(slots)):
            for slot in places[places < capacity].tolist():
                written[int(layer), row, slot] += 1

    def counting(
        self: KVCache, layer: jax.Array, k: jax.Array, v: jax.Array, slots: jax.Array
    ) -> KVCache:
        jax.debug.callback(partial(count, capacity=self.capacity), layer, slots)
        return write(self, layer, k, v, slots)

    monkeypatch.setattr(KVCache, "write", counting)
    # Side by side, so that a row of a write is a row of the batch.
    monkeypatch.setattr(backend, "reads_prompts_alone", lambda: False)
    method: Any = methods.dmtd(cycle=3, early=early, late=2, anchor=anchor)
    params = _model().params
    tokens = jnp.asarray([[3, 4, 5, 6, 7], [9, 8, 7, 0, 0]], jnp.int32)
    lengths = jnp.asarray([5, 3], jnp.int32)
    requests = Requests(
        budget=jnp.full(2, 100, jnp.int32),
        stop_ids=jnp.full(1, -1, jnp.int32),
        sampling=SamplingRows.of([Sampling()] * 2),
    )
    prefill = jax.jit(method.prefill, static_argnums=4)
    state = prefill(params, tokens, lengths, requests, 128)
    jax.effects_barrier()
    # The shorter prompt's padding was written too: it is no part of the text.
    for key in [key for key in written if key[2] >= int(lengths[key[1]])]:
        del written[key]
    step = jax.jit(method.step)
    for _ in range(3):
        state = step(params, state)
    jax.effects_barrier()
    assert set(written.values()) == {1}
    for row in range(2):
        length = int(state.cache.length[row])
        refilled = int(state.extra.middle_length[row])
        for layer in range(LAYERS):
            end = refilled if early <= layer < LAYERS - 2 else length
            assert [(layer, row, slot) in written for slot in range(length)] == [
                slot < end for slot in range(length)
            ]


def test_windows_context_end_and_budgets() -> None:
    """Sliding windows in some layers, and a context that the answers fill."""
    changes: dict[str, Any] = {"sliding_windows": (None, 9, 5, None, 7), "max_position": 100}
    model = _model(**changes)
    groups: dict[str, Any] = {"early": 1, "late": 2, "anchor": "prompt"}
    method = methods.dmtd(cycle=4, **groups)
    found = _decode(method, 3, model=model, max_new_tokens=1000)
    _check(found, model, PROMPTS, cycle=4, **groups)
    for prompt, completion in zip(PROMPTS, found, strict=True):
        assert completion.finish_reason == "context"
        assert len(prompt) + len(completion.token_ids) == 100
    for budget in (1, 2, 3, 6):
        short = _decode(method, 3, model=model, max_new_tokens=budget)
        assert [c.token_ids for c in short] == [c.token_ids[:budget] for c in found]


def test_an_end_token_inside_a_cycle_ends_the_row() -> None:
    groups: dict[str, Any] = {"early": 0, "late": 2, "anchor": "prompt"}
    method = methods.dmtd(cycle=4, **groups)
    free = _decode(method)
    end = free[1].token_ids[6]
    model = dataclasses.replace(
        _model(),
        params=_model().params.replace(
            config=dataclasses.replace(_model().config, eos_token_ids=(end,))
        ),
    )
    for batch_size in (1, 3):
        for ours, whole in zip(_decode(method, batch_size, model=model), free, strict=True):
            ids = list(whole.token_ids)
            assert list(ours.token_ids) == ids[: ids.index(end) + 1 if end in ids else None]


def test_draws_are_those_of_the_training_forward() -> None:
    """The same key at the same position, from the teacher-forced logits."""
    groups: dict[str, Any] = {"early": 1, "late": 2, "anchor": "prompt"}
    sampling = Sampling(0.7, top_k=20, seed=3)
    found = _decode(methods.dmtd(cycle=3, **groups), 3, sampling=sampling)
    assert [c.token_ids for c in found] != [c.token_ids for c in _decode(methods.dmtd(3, 1, 2), 3)]
    for prompt, completion in zip(PROMPTS, found, strict=True):
        text = [*prompt, *completion.token_ids]
        logits = _teacher_forced(_model(), text, len(prompt), cycle=3, **groups)
        rows = logits[len(prompt) - 1 : -1]
        positions = jnp.arange(len(prompt), len(text), dtype=jnp.int32)
        drawn = sample(jnp.asarray(rows), SamplingRows.of([sampling] * len(rows)), positions)
        assert np.asarray(drawn).tolist() == list(completion.token_ids)


def test_training_and_decoding_must_agree() -> None:
    """What the weights were trained for is the default; another anchor or group is refused."""
    trained = CycleConfig(early=1, late=2, cycle=3, anchor="sequence")
    config = dataclasses.replace(_model().config, cycles=trained)
    model = dataclasses.replace(_model(), params=_model().params.replace(config=config))
    found = _decode(methods.dmtd(cycle=3), model=model)
    groups: dict[str, Any] = {"early": 1, "late": 2, "anchor": "sequence"}
    assert [c.token_ids for c in found] == [
        c.token_ids for c in _decode(methods.dmtd(cycle=3, **groups))
    ]
    for wrong in ({"anchor": "prompt"}, {"early": 0}, {"late": 1}):
        with pytest.raises(InputError, match="trained with"):
            _decode(methods.make_method("dmtd", {"cycle": 3, **wrong}), model=model)
    with pytest.warns(UserWarning, match="trained for cycles of 3"):
        _decode(methods.dmtd(cycle=2), model=model)
    with pytest.raises(InputError, match="leave no middle"):
        _decode(methods.dmtd())
    with pytest.raises(InputError, match="asks for a cycle of 5"):
        _decode(methods.dmtd(3, late=2), prompts=[Prompt("0", token_ids=(1,), cycle=5)])
    with pytest.raises(InputError, match="ar has no cycles"):
        _decode(methods.autoregressive(), prompts=[Prompt("0", token_ids=(1,), cycle=5)])


def test_untrained_weights_are_said_to_be() -> None:
    with pytest.warns(UserWarning, match="not trained for cycles"):
        _decode(methods.dmtd(cycle=2, late=2), prompts=[[5]], max_new_tokens=2)


def test_cycle_one_with_heads_everywhere_is_not_the_plain_model() -> None:
    """Late layers get the sum: a model must be trained for it."""
    cyclic = _decode(methods.dmtd(cycle=1, late=2))
    plain = _decode(methods.autoregressive())
    assert [c.token_ids for c in cyclic] != [c.token_ids for c in plain]
    assert [c.token_ids[0] for c in cyclic] == [c.token_ids[0] for c in plain]
    expected = transformer.greedy(_model().params, PROMPTS[0], 1, ())
    assert list(plain[0].token_ids[:1]) == expected
