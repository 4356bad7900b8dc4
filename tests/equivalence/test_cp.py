"""CP heads: the loss against a slow sum, drafts against tables of all paths, steps against texts.

The identities of the mixture itself are in tests/unit/test_cp_mixture.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mtd_jax import generate, methods
from mtd_jax.decoding import engine
from mtd_jax.decoding.heads import Heads
from mtd_jax.decoding.method import Requests
from mtd_jax.decoding.sampling import Sampling, SamplingRows
from mtd_jax.decoding.tree import TokenTree
from mtd_jax.errors import InputError
from mtd_jax.methods.cp_heads import CPSpec
from mtd_jax.methods.cp_weights import CPWeights
from mtd_jax.transformer.model import Parameters, normed
from mtd_jax.transformer.packed import Packed, frozen_rows
from tests.oracle import cp_mixture as oracle
from tests.support import heads, tiny

OPTIONS: list[dict[str, Any]] = [
    {"loss": "joint", "rank": 3, "tokens": 3, "factor": 8, "balance": 0.1},
    {"loss": "joint", "rank": 1, "tokens": 2, "factor": 0},
    {"loss": "joint", "rank": 2, "tokens": 2, "own_output": True},
    {"loss": "distillation", "rank": 2, "tokens": 3, "factor": 0, "beta": 0.7, "gamma": 0.5},
]
TEXTS = [[5, 6, 7, 8, 9, 6, 5], [11, 12, 13], [3, 4, 3, 4], [9] * 6]


def _setting(options: dict[str, Any]) -> tuple[CPSpec, CPWeights, Parameters]:
    model = tiny.language_model()
    spec = methods.make_spec("cp", options)
    assert isinstance(spec, CPSpec)
    weights = heads.random(model, "cp", **options).weights
    # Small enough that no table is one-hot.
    return spec, jax.tree.map(lambda x: 0.2 * x, weights), model.params


def _slow(
    spec: CPSpec, weights: CPWeights, base: Parameters, ids: Sequence[int] = ()
) -> dict[str, float]:
    """The loss and its parts text by text, position by position, step by step."""
    columns = {token: column for column, token in enumerate(ids or range(base.config.vocab_size))}
    steps = spec.tokens
    nll, kl, number = np.zeros(steps), np.zeros(steps), np.zeros(steps)
    joint, whole, usage, wins = 0.0, 0, np.zeros(spec.rank), np.zeros(spec.rank)
    for text in TEXTS:
        w, p, plain = oracle.tables(weights, base, text, ids)
        for t in range(len(text) - 1):
            usage += w[t]
            wins[w[t].argmax()] += 1
            ahead = [columns.get(token) for token in text[t + 1 : t + 1 + steps]]
            for s, column in enumerate(ahead):
                pi = oracle.posterior(w[t], p[t], ahead[:s])
                q = pi @ p[t, :, s]
                nll[s] -= 0.0 if column is None else np.log(q[column])
                kl[s] += (plain[t + s] * (np.log(plain[t + s]) - np.log(q))).sum()
                number[s] += 1
            if len(ahead) == steps:
                seen = [(s, x) for s, x in enumerate(ahead) if x is not None]
                chances = [np.prod([p[t, a, s, x] for s, x in seen]) for a in range(spec.rank)]
                joint -= np.log(w[t] @ chances)
                whole += 1
    loss = nll.sum()
    if spec.loss == "distillation":
        decay = spec.gamma ** np.arange(steps)
        loss = (decay * (spec.beta * kl + (1 - spec.beta) * nll)).sum()
    share = usage / number[0]
    balance = spec.rank * (wins / number[0] * share).sum()
    return {
        "loss": loss / number[0] + spec.balance * balance,
        "joint": joint / whole,
        "usage_entropy": -(share * np.log(share)).sum(),
        **{f"conditional_{s + 1}": nll[s] / number[s] for s in range(steps)},
    }


@pytest.mark.parametrize(
    ("options", "ids"),
    [*((options, ()) for options in OPTIONS), (OPTIONS[-1], (9, 5, 3, 12, 40))],
    ids=str,
)
def test_the_loss_is_the_slow_sum(options: dict[str, Any], ids: tuple[int, ...]) -> None:
    spec, weights, base = _setting(options)
    batch = heads.packed(TEXTS)
    counts = spec.counts(batch)

    def loss(weights: Any, base: Any) -> Any:
        return spec.training_loss(weights, base, batch, counts, chunk=5, vocabulary=ids)

    taken = jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)
    (_, totals), (own, others) = jax.jit(taken)(weights, base)
    for name, value in _slow(spec, weights, base, ids).items():
        assert float(totals[name]) == pytest.approx(value, rel=2e-4), name
    for leaf in jax.tree.leaves(own):
        # With one expert the gate decides nothing.
        assert float(jnp.abs(leaf).max()) > 0 or leaf.shape[-1] == spec.rank == 1
    assert all(float(jnp.abs(leaf).max()) == 0 for leaf in jax.tree.leaves(others))
    shares = [float(totals[f"responsibility_{a + 1}"]) for a in range(spec.rank)]
    assert sum(shares) == pytest.approx(1.0, rel=1e-5)


def _in_one_row(texts: list[list[int]]) -> Packed:
    """The texts one behind the other."""
    parts = [heads.packed([text]) for text in texts]
    numbered = [p.replace(segments=p.segments * (i + 1)) for i, p in enumerate(parts)]
    return jax.tree.map(lambda *x: jnp.concatenate(x, axis=1), *numbered)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_documents_in_one_row_do_not_see_each_other(options: dict[str, Any]) -> None:
    """Windows of tokens ahead end with their document: value and gradient are as of rows alone."""
    spec, weights, base = _setting(options)
    found = []
    for batch in (_in_one_row(TEXTS), heads.packed(TEXTS)):
        counts = spec.counts(batch)
        loss = jax.value_and_grad(spec.training_loss, has_aux=True)
        found.append(loss(weights, base, batch, counts, chunk=7))
    (a, b) = found
    np.testing.assert_allclose(a[0][0], b[0][0], rtol=1e-5)
    for name, value in b[0][1].items():
        np.testing.assert_allclose(a[0][1][name], value, rtol=1e-4, err_msg=name)
    jax.tree.map(
        lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-3, atol=1e-5 * abs(y).max()),
        a[1],
        b[1],
    )


@pytest.mark.parametrize("loss", ["joint", "distillation"])
def test_memory_grows_neither_with_the_rank_nor_with_the_tokens(loss: Any) -> None:
    config = tiny.config(vocab_size=2048)
    base = jax.eval_shape(lambda: tiny.params(config))
    batch = jax.eval_shape(lambda: heads.packed([[5] * 128] * 4))

    def temporary(rank: int, tokens: int) -> int:
        spec = CPSpec(rank=rank, tokens=tokens, factor=4, loss=loss)
        return heads.training_bytes(spec, base, batch, chunk=64)

    assert temporary(8, 4) <= 1.3 * temporary(1, 2)


PROMPTS = [[7] * 6, [3, 4, 5, 6], [50, 40, 50, 40, 50]]


def _started(method: Any, temperature: float = 0.0) -> Any:
    params = tiny.language_model().params
    lengths = jnp.asarray([len(p) for p in PROMPTS], jnp.int32)
    tokens = jnp.asarray([p + [0] * (8 - len(p)) for p in PROMPTS], jnp.int32)
    requests = Requests(
        budget=jnp.full(3, 30, jnp.int32),
        stop_ids=jnp.full(8, -1, jnp.int32),
        sampling=SamplingRows.of([Sampling(temperature, seed=i) for i in range(3)]),
    )
    return engine.start(method, params, tokens, lengths, requests, 128)[0]


@pytest.mark.parametrize("options", [OPTIONS[0], OPTIONS[2]], ids=str)
def test_drafts_are_the_likeliest_along_their_paths(options: dict[str, Any]) -> None:
    """Against the table of the experts' chances on every path."""
    _, weights, base = _setting(options)
    tree = TokenTree.branching(*(3, 2)[: options["tokens"] - 1])
    found = Heads("cp", options, "tiny", weights)
    method: Any = methods.make_method("cp", {"tree": "chain"}, found)
    state = _started(method)
    drafts, _ = method.drafts(base, state.extra.row, state, tree)
    for row, prompt in enumerate(PROMPTS):
        tables = oracle.tables(weights, base, prompt)
        w, p = tables[0][-1], tables[1][-1]
        tokens = [int(state.pending[row]), *np.asarray(drafts[row]).tolist()]
        for node in range(tree.size):
            way = [tokens[n] for n in dict.fromkeys(tree.paths[node].tolist())]
            children = [tokens[child] for child in tree.children(node)]
            if children:
                q = oracle.posterior(w, p, way) @ p[:, len(way)]
                assert children == np.argsort(-q, kind="stable")[: len(children)].tolist()


@cache
def _fitted() -> Heads:
    model = tiny.language_model()
    texts = heads.answers(model, PROMPTS, 30)
    return heads.fitted(model, texts, "cp", steps=40, rank=2, factor=8)


@pytest.mark.parametrize(
    "decoding",
    [{"tree": "2x2x1"}, {"acceptance": "rejection"}, {"tree": "2x2x1", "acceptance": "rejection"}],
    ids=str,
)
def test_a_fused_step_is_a_draft_and_a_verification(decoding: dict[str, Any]) -> None:
    """What a step leaves behind is what a new prompt of the longer text would begin with."""
    model = tiny.language_model()
    method: Any = methods.make_method("cp", {"tree": "chain"} | decoding, _fitted())
    state = _started(method)
    state, _ = engine.run(method, model.params, state, 3)
    assert int(state.tally.histogram[:, 1:].sum()) > 0
    text, length = np.asarray(state.text), np.asarray(state.cache.length)
    tree = method.trees[-1]
    makes = method.drafts if method.drawn else method.likeliest
    draft = jax.jit(makes, static_argnames="tree")
    drafts = draft(model.params, state.extra.row, state, tree=tree)
    if method.drawn:
        assert drafts[1].shape[1] == np.sum(tree.depth < tree.max_depth)
    rows = []
    for row in range(3):
        kept = text[row, : length[row]].tolist()
        rows.append(frozen_rows(model.params, heads.packed([kept]))[0, -1])
    np.testing.assert_allclose(state.extra.row, jnp.stack(rows), atol=1e-4)
    expected = draft(model.params, jnp.stack(rows), state, tree=tree)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=1e-4), drafts, expected)


@pytest.mark.parametrize("marginal", [False, True], ids=["base", "own-first-token"])
def test_a_fused_step_keeps_what_a_pass_of_its_own_would(marginal: bool) -> None:
    """Drafts made apart, a slow pass over text and drafts apart: the step emits what they give."""
    model = tiny.language_model()
    made: Any = methods.make_method("cp", {"tree": "chain"}, _fitted())
    method = made.replace(marginal=marginal)
    state, tree, counts = _started(method), made.trees[-1], []
    texts = [[*prompt, int(token)] for prompt, token in zip(PROMPTS, state.pending, strict=True)]
    for _ in range(6):
        drafts = np.asarray(method.drafts(model.params, state.extra.row, state, tree)[0]).tolist()
        state = method.step(model.params, state)
        for row, text in enumerate(texts):
            w, p, plain = oracle.tables(_fitted().weights, model.params, [*text, *drafts[row]])
            target = np.einsum("tr,trv->tv", w, p[:, :, 0]) if marginal else plain
            said = target.argmax(-1)[len(text) - 1 :].tolist()
            kept = [d == s for d, s in zip(drafts[row], said, strict=False)]
            count = 1 + [*kept, False].index(False)
            assert state.emitted[row, : state.emitted_count[row]].tolist() == said[:count]
            counts.append(count)
            text += said[:count]
    assert min(counts) == 1 < max(counts)


def test_drafts_of_drawing_rows_share_the_noise_of_the_draw() -> None:
    """A mixture that says what the base says drafts what the base will draw, at any temperature."""
    model = tiny.language_model()
    spec = CPSpec(rank=2, tokens=2, own_output=True)
    weights = jax.tree.map(jnp.zeros_like, spec.initial(model.params, jax.random.key(0)))
    found = Heads("cp", {"rank": 2, "tokens": 2, "own_output": True}, "tiny", weights)
    method: Any = methods.make_method("cp", {"tree": "chain"}, found)
    state = _started(method, temperature=1.5)
    flat = model.params.replace(
        embedding=jnp.zeros_like(model.params.embedding),
        head=None if model.params.head is None else jnp.zeros_like(model.params.head),
    )
    # Both are uniform now.
    after = method.step(flat, state)
    assert after.emitted_count.tolist() == [2, 2, 2]


@pytest.mark.parametrize("decoding", [{"tree": "2x2x1"}, {"acceptance": "rejection"}], ids=str)
def test_a_whole_model_decodes_its_own_first_token(decoding: dict[str, Any]) -> None:
    """The marginal of step 1 is what is verified, what is drawn behind the prompt, and the base."""
    model = tiny.language_model()
    made: Any = methods.make_method("cp", {"tree": "chain"} | decoding, _fitted())
    method = made.replace(marginal=True)
    plain: Any = methods.reference(method)
    assert plain.max_emit == 1
    for temperature in (0.0,) if method.drawn else (0.0, 0.8):
        sampling = Sampling(temperature, seed=3)
        found, expected = (
            generate(model, m, PROMPTS, max_new_tokens=20, sampling=sampling)
            for m in (method, plain)
        )
        assert [c.token_ids for c in found] == [c.token_ids for c in expected]
        assert sum(c.metrics.accepted for c in found) > 0
    for prompt, completion in zip(PROMPTS, _greedy(plain), strict=True):
        text = [*prompt, *completion]
        w, p, _ = oracle.tables(_fitted().weights, model.params, text)
        said = np.einsum("tr,trv->tv", w, p[:, :, 0]).argmax(-1)
        assert said[len(prompt) - 1 : -1].tolist() == completion


def _greedy(method: Any) -> list[list[int]]:
    done = generate(tiny.language_model(), method, PROMPTS, max_new_tokens=20)
    return [list(c.token_ids) for c in done]


@pytest.mark.parametrize("trunk", ["frozen", "trained"])
def test_guesses_are_held_against_what_is_decoded(trunk: str) -> None:
    """The base's own token; or the mixture's first, where the two were trained together."""
    options = {"loss": "joint", "rank": 3, "tokens": 3, "factor": 8, "trunk": trunk}
    spec, weights, base = _setting(options)
    own, guesses = spec.guesses(weights, base, heads.packed(TEXTS), 4, chunk=5)
    other = 0
    for row, text in enumerate(TEXTS):
        w, p, plain = oracle.tables(weights, base, text)
        mixed = np.einsum("tr,trv->tv", w, p[:, :, 0])
        said = (plain if trunk == "frozen" else mixed).argmax(-1)
        assert own[row, : len(text)].tolist() == said.tolist()
        other += int((plain.argmax(-1) != mixed.argmax(-1)).sum())
        for t in range(len(text) - 2):
            for s in (1, 2)[: len(text) - 1 - t]:
                q = oracle.posterior(w[t], p[t], text[t + 1 : t + 1 + s]) @ p[t, :, s]
                assert guesses[row, t, s - 1].tolist() == np.argsort(-q)[:4].tolist()
    assert other  # the two differ here and there


def test_own_output_heads_begin_as_the_base_with_its_cap() -> None:
    """As a family has it whose logits are squeezed; here by a lot."""
    base = tiny.params(tiny.config(final_logit_softcap=5.0))
    # Rows so long that the cap decides.
    base = base.replace(final_norm=base.final_norm * 20.0)
    spec = CPSpec(rank=2, tokens=2, own_output=True, loss="joint")
    weights = spec.initial(base, jax.random.key(0))
    _, tables, plain = oracle.tables(weights, base, TEXTS[0])
    e = normed(base, frozen_rows(base, heads.packed(TEXTS[:1])))[0]
    np.testing.assert_allclose(np.exp(weights.log_p(base, e)), tables, rtol=1e-3, atol=1e-6)
    gap = (plain[:, None, None] * np.log(plain[:, None, None] / tables)).sum(-1)
    assert gap.max() < 0.01


def test_a_tree_wider_than_the_vocabulary_is_refused() -> None:
    method = methods.make_method("cp", {"tree": "98x1"}, _fitted())
    with pytest.raises(InputError, match="98 guesses at a place, of 97 tokens"):
        generate(tiny.language_model(), method, PROMPTS, max_new_tokens=2)


def test_none_is_no_draft() -> None:
    plain: Any = methods.make_method("cp", {"tree": "none"}, _fitted())
    assert plain.max_emit == 1
