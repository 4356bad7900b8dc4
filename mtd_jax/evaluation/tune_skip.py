"""Which sublayers a model can leave out while it drafts for itself (arXiv 2309.08168, section 3.3).

The paper searches by Bayesian optimisation on measured time. Here the objective is deterministic:
tokens that a step is expected to emit per weight byte read. How often a draft is right comes from
one pass over texts that the model wrote itself: every row sees the keys and values that the whole
model left of the tokens before it, exactly as a first draft does, so all positions are tried at
once. The sublayers left out are an array, so that no candidate compiles anything.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from mtd_jax import backend
from mtd_jax.decoding.generate import generate
from mtd_jax.decoding.language_model import LanguageModel
from mtd_jax.decoding.requests import AnyPrompt, Prompt, as_prompt, encode
from mtd_jax.decoding.traffic import weight_bytes
from mtd_jax.errors import InputError
from mtd_jax.methods import autoregressive
from mtd_jax.transformer.cache import KVCache
from mtd_jax.transformer.model import Parameters, embed, extend, unembed
from mtd_jax.transformer.stack import Skip, decode_range, rows_at
from mtd_jax.typing import Array, Bool, Int

_MOST_DRAFTS = 8


@dataclasses.dataclass(frozen=True)
class Candidate:
    """A set of sublayers and what drafting without them brings."""

    skip: Skip
    agreement: float
    """Share of positions where the draft is what the whole model says."""
    objective: float
    """Expected tokens a step, over its cost in steps of plain decoding: the speed-up to expect."""
    drafts: int
    """The number of drafts at which that is reached; 0: plain decoding is best."""


class SkipSearch:
    """Texts to try candidates on, and what has been tried."""

    def __init__(
        self,
        model: LanguageModel,
        prompts: Sequence[AnyPrompt],
        *,
        new_tokens: int = 48,
        known: dict[str, float] | None = None,
    ) -> None:
        """Lets the model write the texts.

        Args:
          model: what is to draft for itself.
          prompts: a few, of the kind that it will be used for.
          new_tokens: how much it writes for each; candidates are tried on that.
          known: agreements measured before on the same texts, by `key`; new ones are added to it.
        """
        if model.mesh is not None:
            raise InputError("tuning runs on one device: leave out --mesh")
        self._model = model
        self.known = {} if known is None else known
        texts = []
        for i, given in enumerate(prompts):
            # How long an answer a line asks for does not matter: all of them are as long here.
            prompt = dataclasses.replace(as_prompt(given, i), max_new_tokens=None)
            encoded = encode(
                prompt, model.config, model.tokenizer, max_new_tokens=new_tokens, chat=None
            )
            if encoded.budget < new_tokens:
                raise InputError(f"prompt {prompt.id} leaves no room for {new_tokens} tokens")
            texts.append(list(encoded.token_ids))
        done = generate(
            model,
            autoregressive(),
            [Prompt(id=str(i), token_ids=tuple(t)) for i, t in enumerate(texts)],
            max_new_tokens=new_tokens,
            ignore_eos=True,
        )
        lengths = [len(text) for text in texts]
        texts = [t + list(c.token_ids) for t, c in zip(texts, done, strict=True)]
        tokens = np.zeros((len(texts), max(len(t) for t in texts)), np.int32)
        for i, text in enumerate(texts):
            tokens[i, : len(text)] = text
        self._tokens = jnp.asarray(tokens)
        # The newest token of a prompt is the first that a draft follows.
        self._rows = jnp.asarray(lengths, jnp.int32)[:, None] - 1 + jnp.arange(new_tokens)[None]
        self._cache, self._expected = _whole(model.params, self._tokens, self._rows)

    def candidate(self, skip: Skip) -> Candidate:
        """Tries a set, or remembers it."""
        key = _key(skip)
        if key not in self.known:
            layers = np.arange(self._model.config.num_layers)
            left_out = [np.isin(layers, list(part)) for part in (skip.attention, skip.mlp)]
            keep = jnp.asarray(~np.stack(left_out, axis=1))
            drafts = _drafts(self._model.params, self._cache, self._tokens, self._rows, keep)
            self.known[key] = float((drafts == self._expected).mean())
        return self._scored(skip, self.known[key])

    def share(self, skip: Skip) -> float:
        """Of the model's weights: what a draft reads."""
        return weight_bytes(self._model.params, skip) / weight_bytes(self._model.params)

    def _scored(self, skip: Skip, agreement: float) -> Candidate:
        share = self.share(skip)
        best, drafts = 1.0, 0
        rate = min(agreement, 0.999)
        for count in range(1, _MOST_DRAFTS + 1):
            tokens = (1 - rate ** (count + 1)) / (1 - rate)
            speed = tokens / (count * share + backend.relative_step_cost(count + 1))
            if speed > best:
                best, drafts = speed, count
        if drafts == 0:  # no speed-up: what the best of the bad ones would cost
            best = (1 + rate) / (share + backend.relative_step_cost(2))
        return Candidate(skip, agreement, min(best, 1.0) if drafts == 0 else best, drafts)

    def search(
        self, evaluations: int, progress: Callable[[Candidate], None] = lambda _: None
    ) -> Candidate:
        """The best set found in at most so many evaluations; the same every time.

        First every sublayer alone; then they are added in the order of the harm they do, as long as
        the objective rises; then single ones are put in or taken out while that helps.
        """
        tried: list[Candidate] = []

        def attempt(skip: Skip) -> Candidate:
            tried.append(self.candidate(skip))
            progress(max(tried, key=_worth))
            return tried[-1]

        layers = self._model.config.num_layers
        singles = [attempt(skip) for skip in itertools.islice(_singles(layers), evaluations)]
        singles.sort(key=_worth, reverse=True)
        current = singles[0]
        for single in singles[1:]:
            if len(tried) >= evaluations:
                break
            found = attempt(_flipped(current.skip, single.skip))
            current = max(current, found, key=_worth)
        improved = True
        while improved:
            improved = False
            for single in singles:
                flipped = _flipped(current.skip, single.skip)
                if len(tried) >= evaluations:
                    return current
                if flipped.attention or flipped.mlp:
                    found = attempt(flipped)
                    improved = improved or _worth(found) > _worth(current)
                    current = max(current, found, key=_worth)
        return current


def _worth(candidate: Candidate) -> float:
    return candidate.objective


@jax.jit
def _whole(
    params: Parameters, tokens: Int[Array, "B T"], rows: Int[Array, "B rows"]
) -> tuple[KVCache, Int[Array, "B rows"]]:
    """The whole model's keys and values (behind them room for the drafts'), and its answers."""
    batch, length = tokens.shape
    capacity = length + rows.shape[1]
    cache = KVCache.empty(params.config, batch, capacity, params.embedding.dtype)
    x, cache = extend(params, cache, tokens)
    x = jnp.take_along_axis(x, rows[:, :, None], axis=1)
    return cache, jnp.argmax(unembed(params, x), axis=-1).astype(jnp.int32)


@jax.jit
def _drafts(
    params: Parameters,
    cache: KVCache,
    tokens: Int[Array, "B T"],
    positions: Int[Array, "B rows"],
    keep: Bool[Array, "L 2"],
) -> Int[Array, "B rows"]:
    """What the rows at these positions draft without some sublayers."""
    config, length = params.config, tokens.shape[1]
    batch, count = positions.shape
    text = jnp.broadcast_to(jnp.arange(length, dtype=jnp.int32)[None, :], (batch, length))
    before = text[:, None, :] < positions[:, :, None]
    own = jnp.broadcast_to(jnp.eye(count, dtype=jnp.bool)[None], (batch, count, count))
    mask = jnp.concatenate([before, own], axis=2)
    keys = jnp.concatenate([text, positions], axis=1)
    slots = length + jnp.arange(count, dtype=jnp.int32)[None, :]
    x, _ = decode_range(
        config,
        params.blocks,
        cache,
        embed(params, jnp.take_along_axis(tokens, positions, axis=1)),
        0,
        config.num_layers,
        rows=rows_at(config, positions, keys, mask, positions + 1),
        slots=jnp.broadcast_to(slots, (batch, count)),
        keep=keep,
    )
    return jnp.argmax(unembed(params, x), axis=-1).astype(jnp.int32)


def _singles(layers: int) -> Iterator[Skip]:
    for layer in range(layers):
        yield Skip(attention=frozenset([layer]))
        yield Skip(mlp=frozenset([layer]))


def _flipped(one: Skip, other: Skip) -> Skip:
    return Skip(one.attention ^ other.attention, one.mlp ^ other.mlp)


def _key(skip: Skip) -> str:
    return f"attention {sorted(skip.attention)} mlp {sorted(skip.mlp)}"
