"""Every lossless method emits what plain decoding emits: token for token, whatever happens."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import cache, partial
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mtd_jax import Completion, Prompt, Sampling, generate, methods
from mtd_jax.decoding.clock import Clock
from mtd_jax.decoding.heads import Heads
from mtd_jax.decoding.language_model import LanguageModel
from mtd_jax.evaluation.losslessness import verify
from tests.oracle import cp_mixture as cp_oracle
from tests.oracle import dmtd as dmtd_oracle
from tests.oracle import transformer as oracle
from tests.support import heads, tiny
from tests.support.lossless import AS_OTHERS, METHODS, OWN_PLAIN, UNTRAINED

pytestmark = pytest.mark.filterwarnings("ignore:these weights were not trained")

# Windows in some layers, and a context that the answers fill.
CONFIG = tiny.config(sliding_windows=(None, 9, 5), max_position=100, eos_token_ids=())
PROMPTS = [
    [3, 4, 5, 6, 3, 4, 5, 6, 3],
    [7] * 20,
    [9, 8, 7, 6, 5, 4],
    [11],
    [50, 40, 50, 40, 50],
    [60] * 3,
    [1, 2, 3, 4] * 8,
    [96],
]
BUDGET = 40
# Tokens from the middle of answers, that drafts are accepted of and behind.
ENDS = (41, 20, 34, 38, 74)
TIE = 1e-4


class _Ending(LanguageModel):
    """With an end token of our choice: in the config it would be another program."""

    stop_id: ClassVar[int]

    @property
    def eos_token_ids(self) -> tuple[int, ...]:
        return (self.stop_id,)


@cache
def _model() -> LanguageModel:
    return tiny.language_model(CONFIG)


@cache
def _heads(label: str) -> Heads | None:
    """Heads that are right now and then, because they know half of the answers; or never."""
    name = label.split(":")[0]
    if name not in methods.SPECS:
        return None
    if label in UNTRAINED:
        return heads.random(_model(), name)
    whole = label == "cp:whole"
    options: dict[str, Any] = {"trunk": "trained", "loss": "joint"} if whole else {}
    if label != name and not options:
        return _heads(name)
    texts = [[*p, *c.token_ids] for p, c in zip(PROMPTS, _plain(), strict=True)]
    return heads.fitted(_model(), texts[::2], name, **options)


def _method(label: str, changed: Callable[[Any], Any] = lambda weights: weights) -> Any:
    """With `changed` weights of heads, if it has any."""
    own = _heads(label)
    own = own and dataclasses.replace(own, weights=changed(own.weights))
    made: Any = methods.make_method(label.split(":")[0], METHODS[label], own)
    if label == "dmtd":
        return made
    # Drafts that are cheap, so that `auto` tries all sizes.
    return made.replace(costs=1.0 + 0.02 * np.arange(len(made.sizes), dtype=np.float32))


def _decode(
    method: Any, batch_size: int, model: LanguageModel | None = None, **options: Any
) -> list[Completion]:
    prompts = options.pop("prompts", PROMPTS)
    options = {"max_new_tokens": BUDGET} | options
    return generate(model or _model(), method, prompts, batch_size=batch_size, **options)


def _reference(label: str) -> Any:
    own = label in OWN_PLAIN
    return methods.reference(_method(label)) if own else methods.autoregressive()


def _plain(label: str = "ar", **options: Any) -> list[Completion]:
    return _answers(label if label in OWN_PLAIN else "ar", **options)


@cache
def _answers(label: str, **options: Any) -> list[Completion]:
    return _decode(_reference(label), 1, **options)


def _logits(label: str, text: list[int], prompt: int) -> np.ndarray:
    params = _model().params
    if label == "cp:whole":
        found = _heads(label)
        assert found is not None
        return cp_oracle.first(found.weights, params, text)
    if label != "dmtd":
        return oracle.logits(params, text)[-1]
    places = dmtd_oracle.places(len(text), prompt, 1, "prompt")
    return dmtd_oracle.logits(params, text, places, early=1, late=1)[-1]


def _same(
    found: list[Completion],
    expected: list[Completion],
    label: str = "ar",
    prompts: list[list[int]] = PROMPTS,
) -> None:
    for prompt, ours, plain in zip(prompts, found, expected, strict=True):
        assert ours.finish_reason == plain.finish_reason
        if ours.token_ids == plain.token_ids:
            continue
        pairs = zip(ours.token_ids, plain.token_ids, strict=True)
        at = next(i for i, (a, b) in enumerate(pairs) if a != b)
        logits = _logits(label, [*prompt, *plain.token_ids[:at]], len(prompt))
        gap = abs(logits[ours.token_ids[at]] - logits[plain.token_ids[at]])
        assert gap < TIE, f"parted at new token {at}, logit gap {gap:.2e}"


def _greedy_tokens_are_the_same(label: str, method: Any, batch_size: int) -> None:
    found = _decode(method, batch_size)
    _same(found, _plain(label), label)
    if label in UNTRAINED:
        return
    # Not vacuous: drafts were accepted, and some were not.
    accepted = sum(c.metrics.accepted for c in found)
    assert 0 < accepted < sum(c.metrics.drafted for c in found)
    assert sum(c.metrics.forwards for c in found) < sum(c.metrics.tokens for c in found)


def _an_end_token_inside_a_draft_ends_the_row(label: str, method: Any, batch_size: int) -> None:
    """It is accepted with drafts behind it, in some row, and those are not emitted."""
    model = _Ending(**{f.name: getattr(_model(), f.name) for f in dataclasses.fields(_model())})
    # Methods that copy can draft an end token only if it stands in the prompt.
    known = 14 if label.split(":")[0] in ("ngram", "prompt_lookup") else 0
    pairs = zip(PROMPTS, _plain(label), strict=True)
    prompts = [[*prompt, *plain.token_ids[:known]] for prompt, plain in pairs]
    cut = 0
    for stop_id in ENDS:
        type(model).stop_id = stop_id
        expected = _decode(_reference(label), 1, model, prompts=prompts)
        found = _decode(method, batch_size, model, prompts=prompts)
        _same(found, expected, label, prompts)
        cut += sum(c.metrics.forwards + c.metrics.accepted > len(c.token_ids) for c in found)
        if cut or label in UNTRAINED:
            break
    assert cut or label in UNTRAINED


def _budgets_are_kept(label: str, method: Any, batch_size: int) -> None:
    for budget in (1, 2, 7):
        found = _decode(method, batch_size, max_new_tokens=budget)
        assert [c.token_ids for c in found] == [c.token_ids[:budget] for c in _plain(label)]
    prompts = [
        Prompt(id=str(i), token_ids=tuple(p), max_new_tokens=1 + 5 * i)
        for i, p in enumerate(PROMPTS)
    ]
    found = _decode(method, batch_size, prompts=prompts)
    for i, (ours, plain) in enumerate(zip(found, _plain(label), strict=True)):
        assert ours.token_ids == plain.token_ids[: 1 + 5 * i]


def _answers_end_with_the_context(label: str, method: Any, batch_size: int) -> None:
    found = _decode(method, batch_size, max_new_tokens=1000)
    _same(found, _plain(label, max_new_tokens=1000), label)
    for prompt, completion in zip(PROMPTS, found, strict=True):
        assert completion.finish_reason == "context"
        assert len(prompt) + len(completion.token_ids) == CONFIG.context_length


def _penalties_are_as_strong(label: str, method: Any, batch_size: int) -> None:
    for sampling in (
        Sampling(repetition_penalty=1.4),
        Sampling(presence_penalty=0.8, frequency_penalty=0.4, repetition_penalty=0.9),
    ):
        expected = _plain(label, sampling=sampling)
        assert [c.token_ids for c in expected] != [c.token_ids for c in _plain(label)]
        found = _decode(method, batch_size, sampling=sampling)
        assert [c.token_ids for c in found] == [c.token_ids for c in expected]


def _the_same_seed_draws_the_same_tokens(label: str, method: Any, batch_size: int) -> None:
    """Tokens are drawn by position, so drafts from the text change no draw."""
    if label.startswith("self") or label in ("cp:rejection", "cp:siblings", "dmtd"):
        return  # its drafts are drawn themselves: the distribution is the same, not each draw
    for sampling in (
        Sampling(0.3, seed=5),
        Sampling(0.8, top_k=5, top_p=0.9, repetition_penalty=1.2, seed=1),
    ):
        found = _decode(method, batch_size, sampling=sampling)
        assert [c.token_ids for c in found] == [
            c.token_ids for c in _plain(label, sampling=sampling)
        ]
        assert sum(c.metrics.accepted for c in found) > 0 or label in UNTRAINED


def _greedy_and_drawn_rows_share_a_batch(label: str, method: Any, batch_size: int) -> None:
    samplings = [Sampling(), Sampling(0.7, seed=3)] * 4
    found = _decode(method, batch_size, sampling=samplings)
    for ours, plain in list(zip(found, _plain(label), strict=True))[::2]:
        assert ours.token_ids == plain.token_ids


CHECKS = (
    _greedy_tokens_are_the_same,
    _an_end_token_inside_a_draft_ends_the_row,
    _budgets_are_kept,
    _answers_end_with_the_context,
    _penalties_are_as_strong,
    _the_same_seed_draws_the_same_tokens,
    _greedy_and_drawn_rows_share_a_batch,
)


OF_EACH_KIND = (
    "cp:tree",
    "hidden_transfer:all",
    "independent_heads:tree",
    "medusa:tree",
    "ngram:tree",
    "prompt_lookup",
    "self_speculative",
)


@pytest.mark.parametrize(
    ("label", "batch_size"),
    [
        pytest.param(
            label, size, marks=() if label in OF_EACH_KIND and size == 3 else pytest.mark.slow
        )
        for label in METHODS
        for size in ((3,) if label in AS_OTHERS else (1, 3, 8))
    ],
)
def test_a_method_is_plain_decoding(label: str, batch_size: int) -> None:
    """All in one test, because all of it is one program: nothing may compile after the first."""
    method = _method(label)
    for number, check in enumerate(CHECKS):
        with Clock() as clock:
            check(label, method, batch_size)
        # Warm-up may reach into the second: ar at batch 1 is compiled where a check first asks.
        if number > 1:
            assert clock.compilations == 0, check.__name__


@cache
def _roomy() -> LanguageModel:
    """The same weights, hence the same heads, with room for caches of 128, 256 and 512 slots."""
    return tiny.language_model(dataclasses.replace(CONFIG, max_position=400))


@cache
def _long_answers() -> list[Completion]:
    return _decode(methods.autoregressive(), 1, _roomy(), prompts=PROMPTS[:3], max_new_tokens=1000)


@pytest.mark.slow
@pytest.mark.parametrize("label", ["dmtd:lossy", *OF_EACH_KIND])
def test_answers_that_outgrow_their_cache(label: str) -> None:
    """Over both edges between sizes and up to the context's end; one program for every size."""
    lossy = label == "dmtd:lossy"
    method = methods.dmtd(cycle=4, early=1, late=1) if lossy else _method(label)
    prompts, model = PROMPTS[:3], _roomy()
    _decode(method, 3, model, prompts=prompts, max_new_tokens=50)
    with Clock() as clock:
        found = _decode(method, 3, model, prompts=prompts, max_new_tokens=1000)
    # For either size one that grows the cache (other methods share it) and one that goes on.
    assert clock.compilations <= 4
    if lossy:
        alone = _decode(method, 1, model, prompts=prompts, max_new_tokens=1000)
        assert [c.token_ids for c in found] == [c.token_ids for c in alone]
    else:
        _same(found, _long_answers(), label, prompts)
    assert [c.prompt_tokens + len(c.token_ids) for c in found] == [400] * 3
    # Rows that end in caches of different sizes, in another order.
    budgets = (300, 30, 200)
    shorter = [
        Prompt(id=str(i), token_ids=tuple(p), max_new_tokens=n)
        for i, (p, n) in enumerate(zip(prompts[::-1], budgets, strict=True))
    ]
    with Clock() as clock:
        again = _decode(method, 3, model, prompts=shorter)
    assert clock.compilations == 0
    for ours, whole, budget in zip(again, found[::-1], budgets, strict=True):
        assert ours.token_ids == whole.token_ids[:budget]


def test_plain_decoding_is_the_oracle() -> None:
    for prompt, plain in zip(PROMPTS[:4], _plain(), strict=False):
        expected = oracle.greedy(_model().params, prompt, 20, ())
        assert list(plain.token_ids[:20]) == expected


@pytest.mark.parametrize(
    ("agreement", "share", "drafts"),
    [(0.95, 0.45, True), (0.96, 0.99, False), (0.7, 0.6, False)],
)
def test_self_speculation_drafts_where_its_tuning_says_that_it_pays(
    agreement: float, share: float, drafts: bool
) -> None:
    """By the costs that a CPU is believed to have where nobody measured them."""
    method = methods.self_speculative(skip_mlp="1", agreement=agreement, share=share)
    found = _decode(method, 1, prompts=PROMPTS[:1])
    assert (found[0].metrics.drafted > 0) == drafts
    _same(found, _plain()[:1], prompts=PROMPTS[:1])


def test_metrics_add_up() -> None:
    found = _decode(_method("ngram:chain"), 3)
    for completion in found:
        metrics = completion.metrics
        facts = metrics.to_dict()
        assert len(metrics.histogram) == 5
        assert facts["num_spec_steps"] == sum(metrics.histogram) <= metrics.forwards - 1
        assert facts["num_accepted_draft_tokens"] <= facts["num_draft_tokens"]
        # One token a pass, and what was accepted: nothing is drafted that a budget would cut.
        assert metrics.forwards + metrics.accepted == metrics.tokens
        assert facts["mean_acceptance_length"] == pytest.approx(
            1 + metrics.accepted / metrics.spec_steps, abs=1e-4
        )
        positions = facts["per_position_acceptance"]
        assert positions == sorted(positions, reverse=True)
        assert sum(positions) == pytest.approx(metrics.accepted / metrics.spec_steps, abs=1e-3)
    plain = _plain()[0].metrics
    assert plain.forwards == plain.tokens
    assert plain.mean_acceptance_length is None
    assert plain.histogram == (0,)


def test_typical_acceptance_is_greedy_at_temperature_zero_and_marked_lossy() -> None:
    typical = methods.ngram(drafts=4, acceptance="typical")
    assert not typical.lossless
    assert all(_method(label).lossless for label in METHODS)
    _same(_decode(typical, 3), _plain())
    drawn = _decode(typical, 3, sampling=Sampling(1.0, seed=2))
    assert sum(c.metrics.accepted for c in drawn) > 0


@pytest.mark.slow
@pytest.mark.parametrize("label", ["dmtd", *OF_EACH_KIND])
def test_bfloat16_parts_at_ties_only(label: str) -> None:
    """One unit in the last place of a logit is allowed, because more rows round differently."""
    rounded = partial(jax.tree.map, lambda w: w.astype(jnp.bfloat16))
    model = dataclasses.replace(_model(), params=rounded(_model().params))
    report = verify(model, _method(label, rounded), PROMPTS, max_new_tokens=BUDGET, batch_size=3)
    assert report.passed, report.to_dict()
    assert sum(c.identical for c in report.comparisons) > len(PROMPTS) // 2
