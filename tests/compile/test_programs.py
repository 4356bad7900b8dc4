"""Properties of the compiled programs: none is made twice, and none copies weights or cache."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import pytest

from mtd_jax import Prompt, Sampling, generate, methods
from mtd_jax.decoding import engine
from mtd_jax.decoding.clock import Clock
from mtd_jax.decoding.method import Requests
from mtd_jax.decoding.sampling import SamplingRows
from mtd_jax.evaluation.bench import bench
from mtd_jax.parameters import size_in_bytes
from mtd_jax.transformer.model import prepare_for_decoding
from tests.support import heads, tiny

AR = methods.autoregressive()


@pytest.mark.parametrize("batch_size", [1, 3])
def test_nothing_compiles_after_warm_up(batch_size: int) -> None:
    model = tiny.language_model()

    def run(prompts: list[list[int]], **options: Any) -> None:
        budgets = options.pop("budgets", [20] * len(prompts))
        requests = [
            Prompt(id=str(i), token_ids=tuple(p), max_new_tokens=b)
            for i, (p, b) in enumerate(zip(prompts, budgets, strict=True))
        ]
        generate(model, AR, requests, batch_size=batch_size, **options)

    run([[1, 2, 3]] * 3)
    with Clock() as clock:
        run([[4], [5] * 16, [6] * 9])
        run([[1]] * 2, budgets=[1, 90])
        run(
            [[2]] * 3,
            sampling=[Sampling(0.1 * i, i, 1 - 0.1 * i, 0.1 * i, seed=i) for i in range(3)],
        )
        run([[3]], ignore_eos=True)
        list(generate(model, AR, [[7, 8]], max_new_tokens=30, batch_size=batch_size, stream=True))
    assert clock.compilations == 0


@pytest.mark.parametrize("batch_size", [1, 2])
def test_a_benchmark_compiles_in_its_warm_up_alone(batch_size: int) -> None:
    """Which is over a few of the prompts: the caches of some grow, and of some twice."""
    sizes = [(3, 9), (5, 200), (12, 1), (40, 20), (100, 5), (100, 150), (33, 2), (110, 7), (7, 3)]
    prompts = [
        Prompt(id=str(i), token_ids=(i + 1,) * length, max_new_tokens=budget)
        for i, (length, budget) in enumerate(sizes)
    ]
    made: dict[str, Callable[[int], Any]] = {
        "ar": lambda size: AR,
        "ngram": lambda size: methods.ngram(drafts=3),
    }
    model = tiny.language_model()
    result = bench(model, made, prompts, batch_sizes=(batch_size,), repeats=1)
    assert [row.metrics.tokens > 0 for row in result.rows] == [True, True]
    assert [row.metrics.compile_seconds for row in result.rows] == [0.0, 0.0]


DEEP = tiny.config(
    num_layers=12, hidden_size=128, intermediate_size=384, head_dim=32, vocab_size=512
)


def _with_heads(name: str, **options: Any) -> Any:
    return methods.make_method(name, options, heads.random(tiny.language_model(DEEP), name))


SPECULATIVE: dict[str, Callable[[], Any]] = {
    "ngram": methods.ngram,
    "tree": lambda: methods.ngram(branches="2x2"),
    "self_speculative": lambda: methods.self_speculative("4-6", "1", drafts=4),
    "hidden_transfer": lambda: _with_heads("hidden_transfer", tree="2x2", pseudo="accepted"),
    "hidden_transfer:all": lambda: _with_heads("hidden_transfer", tree="2x2", pseudo="all"),
    "hydra": lambda: _with_heads("hydra", copy=True),
}


@pytest.mark.parametrize("method", SPECULATIVE)
def test_choosing_rows_copies_neither_weights_nor_cache(method: str) -> None:
    """All sizes are in one program, and the cache passes through them where it lies."""
    params = prepare_for_decoding(tiny.params(DEEP))
    made = SPECULATIVE[method]()
    state = _state(made, params, batch=1)
    memory: Any = engine.lower_run(made, params, state).compile().memory_analysis()
    # The stacked cache is 12 layers: a copy of keys or values alone is as much as six of them.
    assert memory.temp_size_in_bytes < size_in_bytes(state.cache) // 4
    assert memory.alias_size_in_bytes >= size_in_bytes(state.cache)


def _state(method: Any, params: Any, batch: int) -> Any:
    requests = Requests(
        budget=jnp.full(batch, 9, jnp.int32),
        stop_ids=jnp.full(8, -1, jnp.int32),
        sampling=SamplingRows.of([Sampling()] * batch),
    )
    tokens = jnp.ones((batch, 16), jnp.int32)
    lengths = jnp.full(batch, 16, jnp.int32)
    return engine.start(method, params, tokens, lengths, requests, 1024)[0]


# One is compiled as for a user of a CPU, which takes four times as long.
@pytest.mark.parametrize(
    ("layout", "batch"),
    [
        ("stacked", 1),
        ("stacked", 4),
        pytest.param("prepared", 1, marks=pytest.mark.optimized),
        ("prepared", 4),
    ],
)
def test_a_step_copies_neither_weights_nor_cache(layout: str, batch: int) -> None:
    """The loop's temporary memory stays under a layer's weights, whatever the model's depth."""
    cfg = DEEP
    params = tiny.params(cfg)
    if layout == "prepared":
        params = prepare_for_decoding(params)
    state = _state(AR, params, batch)
    compiled = engine.lower_run(AR, params, state).compile()
    memory: Any = compiled.memory_analysis()
    cache = size_in_bytes(state.cache)
    layer = size_in_bytes(params.blocks) // cfg.num_layers
    assert cache > 7 * layer  # so that a copy of the cache could not hide
    # Beside a layer: logits, scores over the cache, and one layer's keys and values.
    scores = 4 * batch * (cfg.num_heads * 1024 + cfg.vocab_size)
    allowed = layer + 2 * (cache // cfg.num_layers) + 4 * scores
    assert memory.temp_size_in_bytes < allowed, (memory.temp_size_in_bytes, allowed)
    # Donated: the state comes back in the buffers it was given in.
    assert memory.alias_size_in_bytes >= cache


def test_state_has_one_layout_per_shape() -> None:
    """`run` returns exactly what it takes, so that calling it again finds the same program."""
    params = tiny.params()
    requests = Requests(
        budget=jnp.full(1, 90, jnp.int32),
        stop_ids=jnp.full(8, -1, jnp.int32),
        sampling=SamplingRows.of([Sampling()]),
    )
    state, _ = engine.start(
        AR, params, jnp.ones((1, 16), jnp.int32), jnp.full(1, 3, jnp.int32), requests, 128
    )
    before = [(x.shape, x.dtype, x.weak_type) for x in jax.tree.leaves(state)]
    state, output = engine.run(AR, params, state, 5)
    assert [(x.shape, x.dtype, x.weak_type) for x in jax.tree.leaves(state)] == before
    assert int(output.count[0]) == 5
