"""The engine's greedy tokens equal running the whole text again for every token."""

from __future__ import annotations

import dataclasses
from functools import cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mtd_jax import Prompt, Sampling, generate, methods
from mtd_jax.decoding.language_model import LanguageModel
from mtd_jax.decoding.prompt import read_prompt
from mtd_jax.errors import InputError
from mtd_jax.transformer.model import prepare_for_decoding
from tests.oracle import transformer as oracle
from tests.support import tiny
from tests.support.tokenizers import byte_level

AR = methods.autoregressive()
PROMPTS = [[3, 4, 5], [7] * 20, [9, 8, 7, 6, 5, 4], [11], [50, 40], [60] * 3, [1, 2, 3, 4], [96]]
BUDGET = 12


@cache
def _model() -> LanguageModel:
    return tiny.language_model()


@cache
def _answers(stop_ids: tuple[int, ...]) -> list[tuple[int, ...]]:
    return [tuple(oracle.greedy(_model().params, p, BUDGET, stop_ids)) for p in PROMPTS]


def _a_token_that_ends_some_rows_early() -> int:
    """So that EOS falls in the middle of some answers and not of others."""
    answers = _answers(())
    for token in answers[0][3:8]:
        ends = [token in answer for answer in answers]
        if answers[0].index(token) >= 2 and not all(ends):
            return token
    raise AssertionError("no such token: change the seed")


@pytest.mark.parametrize("batch_size", [1, 3, 8])
@pytest.mark.parametrize("layout", ["stacked", "prepared"])
def test_greedy_equals_the_oracle_on_ragged_batches(batch_size: int, layout: str) -> None:
    model = _model()
    if layout == "prepared":
        model = dataclasses.replace(model, params=prepare_for_decoding(tiny.params()))
    done = generate(
        model, AR, PROMPTS, max_new_tokens=BUDGET, batch_size=batch_size, ignore_eos=True
    )
    assert [c.token_ids for c in done] == _answers(())
    assert {c.finish_reason for c in done} == {"length"}
    assert [c.prompt_tokens for c in done] == [len(p) for p in PROMPTS]


@pytest.mark.parametrize("batch_size", [1, 3, 8])
def test_end_tokens_end_their_row_only(batch_size: int) -> None:
    token = _a_token_that_ends_some_rows_early()
    cfg = tiny.config(eos_token_ids=(token,))
    model = dataclasses.replace(_model(), params=_model().params.replace(config=cfg))
    done = generate(model, AR, PROMPTS, max_new_tokens=BUDGET, batch_size=batch_size)
    assert [c.token_ids for c in done] == _answers((token,))
    for completion in done:
        ended = completion.token_ids[-1] == token
        assert completion.finish_reason == ("stop" if ended else "length")


def test_the_tokenizers_end_token_counts_if_the_config_names_none() -> None:
    token = _a_token_that_ends_some_rows_early()
    tokenizer = byte_level()
    tokenizer._inner.eos_token = tokenizer._backend.id_to_token(token)
    cfg = tiny.config(eos_token_ids=())
    params = _model().params.replace(config=cfg)
    model = dataclasses.replace(_model(), params=params, tokenizer=tokenizer)
    done = generate(model, AR, PROMPTS, max_new_tokens=BUDGET, batch_size=3)
    assert [c.token_ids for c in done] == _answers((token,))
    named = dataclasses.replace(model, params=_model().params)
    assert named.eos_token_ids == tiny.CONFIG.eos_token_ids != tokenizer.eos_token_ids


def test_budgets_differ_by_row_and_one_is_enough() -> None:
    prompts = [
        Prompt(id=str(i), token_ids=tuple(p), max_new_tokens=i + 1) for i, p in enumerate(PROMPTS)
    ]
    done = generate(_model(), AR, prompts, batch_size=8, ignore_eos=True)
    assert [c.token_ids for c in done] == [a[: i + 1] for i, a in enumerate(_answers(()))]


def test_stream_adds_up_to_the_whole() -> None:
    chunks = list(
        generate(
            _model(), AR, PROMPTS, max_new_tokens=BUDGET, batch_size=3, ignore_eos=True, stream=True
        )
    )
    for i, answer in enumerate(_answers(())):
        mine = [c for c in chunks if c.index == i]
        assert tuple(t for c in mine for t in c.token_ids) == answer
        assert [c.finish_reason for c in mine[:-1]] == [None] * (len(mine) - 1)
        assert mine[-1].finish_reason == "length"
    assert len(chunks) > 2 * len(PROMPTS)


def test_cache_grows_and_ends_at_the_context() -> None:
    """128 slots to begin with; the context of 512 is filled in three sizes."""
    prompt = [5, 6, 7] * 10
    short = generate(_model(), AR, [prompt], max_new_tokens=2000, ignore_eos=True)[0]
    assert len(prompt) + len(short.token_ids) == tiny.CONFIG.context_length
    assert short.finish_reason == "context"
    # The oracle on the last stretch alone: teacher-forced on what was produced before it.
    text = [*prompt, *short.token_ids]
    expected = oracle.logits(_model().params, text[:-1]).argmax(-1)
    assert text[len(prompt) :] == expected[len(prompt) - 1 :].tolist()


@pytest.mark.parametrize("length", [290, 299])
def test_prompts_that_nearly_fill_an_odd_context(length: int) -> None:
    """The prompt's bucket (512) is longer than the context (300)."""
    model = tiny.language_model(tiny.config(max_position=300))
    prompt = [(5 * i + 3) % 97 for i in range(length)]
    done = generate(model, AR, [prompt], max_new_tokens=50, ignore_eos=True)[0]
    assert done.finish_reason == "context"
    assert len(done.token_ids) == 300 - length
    expected = oracle.logits(model.params, [*prompt, *done.token_ids][:-1]).argmax(-1)
    assert list(done.token_ids) == expected[length - 1 :].tolist()


def test_a_prompt_that_is_no_whole_number_of_chunks() -> None:
    """700 rows: two chunks of 512, the second of which must not be clamped back over the first."""
    params = tiny.params(tiny.config(max_position=2048))
    tokens = jax.random.randint(jax.random.key(0), (1, 700), 0, 97)
    lengths = jnp.array([700], jnp.int32)
    last, cache = read_prompt(params, tokens, lengths, 1024)
    padded = jnp.pad(tokens, ((0, 0), (0, 324)))
    expected, whole = read_prompt(params, padded, lengths, 1024)
    np.testing.assert_array_equal(cache.v[..., :700, :], whole.v[..., :700, :])
    np.testing.assert_array_equal(last, expected)


def test_arrays_of_token_ids_are_prompts() -> None:
    one = generate(_model(), AR, np.array([3, 4, 5]), max_new_tokens=2)
    two = generate(_model(), AR, [np.array([3, 4, 5])], max_new_tokens=2, batch_size=3)
    assert [c.token_ids for c in one] == [c.token_ids for c in two] == [_answers(())[0][:2]]


def test_long_prompts_are_read_in_chunks() -> None:
    cfg = tiny.config(max_position=2048)
    model = tiny.language_model(cfg)
    prompt = [(7 * i * i + 3) % 97 for i in range(1100)]
    done = generate(model, AR, [prompt, prompt[:700], [4]], max_new_tokens=2, batch_size=3)
    alone = [generate(model, AR, [p], max_new_tokens=2)[0] for p in (prompt, prompt[:700], [4])]
    assert [c.token_ids for c in done] == [c.token_ids for c in alone]
    expected = oracle.greedy(model.params, prompt[:700], 1, ())
    assert done[1].token_ids[0] == expected[0]


def test_sampled_tokens_do_not_depend_on_the_batch() -> None:
    samplings = [Sampling(0.9, top_p=0.95, seed=i) for i in range(len(PROMPTS))]
    runs = [
        generate(
            _model(),
            AR,
            PROMPTS,
            sampling=samplings,
            max_new_tokens=9,
            batch_size=size,
            stream=False,
        )
        for size in (1, 3, 8)
    ]
    tokens = [[c.token_ids for c in run] for run in runs]
    assert tokens[0] == tokens[1] == tokens[2]
    other = generate(_model(), AR, PROMPTS, sampling=Sampling(0.9, seed=99), max_new_tokens=9)
    assert [c.token_ids for c in other] != tokens[0]


@pytest.mark.parametrize(
    ("prompt", "options", "message"),
    [
        ([[]], {}, "empty"),
        (["a", ""], {"chat": False}, "no tokenizer"),
        ([[97]], {}, "outside 0..96"),
        ([[-1]], {}, "outside 0..96"),
        ([[2**40]], {}, "outside 0..96"),
        ([[True]], {}, "not a whole number"),
        ([[1] * 512], {}, "no room"),
        ([[1]], {"max_new_tokens": 0}, "at least 1"),
        ([[1]], {"max_new_tokens": -5}, "at least 1"),
        ([[1]], {"batch_size": 0}, "batch_size"),
        ([[1]], {"stop": ["x"]}, "tokenizer"),
        ([[1]], {"sampling": [Sampling(), Sampling()]}, "2 sampling values for 1"),
        (["text"], {}, "no tokenizer"),
        ([{"prompt": "a", "messages": []}], {}, "one of"),
        ([{"promt": "a"}], {}, "did you mean 'prompt'"),
        ([{}], {}, "one of"),
    ],
)
def test_bad_requests_are_refused(prompt: Any, options: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        generate(_model(), AR, prompt, **options)
