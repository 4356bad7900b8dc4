"""Task accuracy by lm-eval (EleutherAI's evaluation harness), of a model as a method decodes it.

The harness brings tasks and metrics; here is the model that it asks. Generation is the engine's.
Likelihoods come from the forward pass of training, in the method's cycles: a context is the prompt,
a continuation is the answer.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mtd_jax.config import CycleConfig
from mtd_jax.decoding.generate import generate
from mtd_jax.decoding.language_model import LanguageModel
from mtd_jax.decoding.method import Method
from mtd_jax.decoding.prompt import bucket_prompt
from mtd_jax.decoding.requests import Prompt
from mtd_jax.decoding.sampling import Sampling
from mtd_jax.errors import InputError
from mtd_jax.evaluation.forward import cycles_of, decoded_hidden
from mtd_jax.transformer.model import Parameters, unembed
from mtd_jax.transformer.packed import unpacked
from mtd_jax.typing import Array, Int

_NEW_TOKENS = 256


def run_tasks(
    model: LanguageModel,
    method: Method,
    tasks: Sequence[str],
    *,
    include: str | None = None,
    limit: int | None = None,
    few_shot: int | None = None,
    chat: bool = False,
    batch_size: int = 1,
    progress: Callable[[int], None] = lambda _: None,
) -> dict[str, dict[str, float]]:
    """Metrics by task; a task's data must be on disk or where the harness can fetch it.

    Args:
      include: directory with tasks of one's own (YAML).
      limit: documents of each task.
      few_shot: examples in front of each; None: what the task says.
      chat: put contexts into the model's chat template.
      progress: is called with the number of requests that are answered.

    Raises:
      InputError: lm-eval is not installed, an unknown task, or data that cannot be had.
    """
    try:
        import lm_eval
        from lm_eval.api.model import LM
        from lm_eval.tasks import TaskManager
    except ImportError:
        raise InputError("tasks need lm-eval: pip install 'mtd-jax[eval]'") from None
    if model.tokenizer is None:
        raise InputError("tasks are text, and the model has no tokenizer")

    class Asked(LM):
        """What the harness calls a model."""

        def __init__(self) -> None:
            super().__init__()
            self._answerer = Answerer(model, method, batch_size, chat, progress)

        def loglikelihood(self, requests: list[Any]) -> list[tuple[float, bool]]:
            """As the harness says."""
            return self._answerer.likelihoods([r.args for r in requests])

        def loglikelihood_rolling(self, requests: list[Any]) -> list[float]:
            """Of whole texts."""
            whole = [("", r.args[0]) for r in requests]
            return [found for found, _ in self._answerer.likelihoods(whole)]

        def generate_until(self, requests: list[Any]) -> list[str]:
            """As the harness says."""
            return [self._answerer.answer(*r.args) for r in requests]

        def apply_chat_template(
            self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
        ) -> str:
            """The conversation as text."""
            return self._answerer.render(chat_history, add_generation_prompt)

        @property
        def tokenizer_name(self) -> str:
            """Tells apart cached requests."""
            return model.fingerprint

    manager = TaskManager(include_path=include)
    unknown = [name for name in tasks if name not in manager.all_tasks]
    if unknown:
        raise InputError(f"lm-eval knows no task '{unknown[0][:80]}'")
    try:
        results: Any = lm_eval.simple_evaluate(
            model=Asked(),
            tasks=list(tasks),
            task_manager=manager,
            limit=limit,
            num_fewshot=few_shot,
            apply_chat_template=chat,
            bootstrap_iters=0,
            log_samples=False,
        )
    except (OSError, ValueError) as error:  # what `datasets` raises for data that it cannot get
        raise InputError(f"lm-eval cannot run these tasks: {error}") from error
    return {
        task: {name: value for name, value in found.items() if isinstance(value, float)}
        for task, found in results["results"].items()
    }


class Answerer:
    """Answers the harness's questions with one model and method."""

    def __init__(
        self,
        model: LanguageModel,
        method: Method,
        batch_size: int,
        chat: bool,
        progress: Callable[[int], None],
    ) -> None:
        """`chat`: contexts are written by the chat template, special tokens and all."""
        self._model, self._method, self._batch_size = model, method, batch_size
        self._chat, self._progress, self._done = chat, progress, 0
        self._cycles = cycles_of(method, model.config)

    def likelihoods(self, pairs: Sequence[tuple[str, str]]) -> list[tuple[float, bool]]:
        """log p(continuation given context), and whether greedy decoding would say it."""
        encoded = [self._encoded(*pair) for pair in pairs]
        # Long ones first, so that memory fails at once if at all; alike ones share a batch.
        order = sorted(range(len(encoded)), key=lambda i: -len(encoded[i][0]))
        found: list[tuple[float, bool]] = [(0.0, True)] * len(encoded)
        size = -(-self._batch_size // self._model.batch_multiple) * self._model.batch_multiple
        for first in range(0, len(order), size):
            part = order[first : first + size]
            for i, result in zip(part, self._scored([encoded[i] for i in part], size), strict=True):
                found[i] = result
            self._advance(len(part))
        return found

    def answer(self, context: str, options: dict[str, Any]) -> str:
        """What the method says behind a context, up to one of `until`."""
        options = dict(options)
        until = options.pop("until", None) or []
        budget = int(options.pop("max_gen_toks", None) or options.pop("max_tokens", _NEW_TOKENS))
        drawn = bool(options.pop("do_sample", False))
        temperature = float(options.pop("temperature", 0.0) or 0.0)
        ids = self._ids(context) or [self._first_token()]
        room = self._model.config.context_length - budget
        if room < 1:
            raise InputError(f"a task asks for {budget} tokens, more than the context has")
        prompt = Prompt("0", token_ids=tuple(ids[-room:]))
        sampling = Sampling(temperature=temperature if drawn else 0.0)
        (completion,) = generate(
            self._model,
            self._method,
            prompt,
            sampling=sampling,
            max_new_tokens=budget,
            stop=[text for text in ([until] if isinstance(until, str) else until) if text],
        )
        self._advance(1)
        return completion.text

    def render(self, messages: list[dict[str, str]], add_generation_prompt: bool) -> str:
        """A conversation in the chat template."""
        tokenizer = self._model.tokenizer
        assert tokenizer is not None
        return tokenizer.chat_text(messages, add_generation_prompt=add_generation_prompt)

    def _advance(self, count: int) -> None:
        self._done += count
        self._progress(self._done)

    def _ids(self, text: str) -> list[int]:
        tokenizer = self._model.tokenizer
        assert tokenizer is not None
        if not text:
            return []
        return tokenizer.encode_all([text], add_special_tokens=not self._chat)[0].ids.tolist()

    def _first_token(self) -> int:
        bos = self._model.config.bos_token_id
        return bos if bos is not None else (*self._model.eos_token_ids, 0)[0]

    def _encoded(self, context: str, continuation: str) -> tuple[list[int], int]:
        """Ids of both, and how many of them are the context's; cut on the left to the model's."""
        # Blanks at the end belong to the next token, as in the harness's own models.
        spaces = len(context) - len(context.rstrip())
        if spaces:
            context, continuation = context[:-spaces], context[-spaces:] + continuation
        start = self._ids(context)
        both = self._ids(context + continuation)
        if not start:
            both, start = [self._first_token(), *both], [self._first_token()]
        behind = max(len(both) - len(start), 1)
        kept = both[-self._model.config.context_length :]
        if behind >= len(kept):
            raise InputError("a task's continuation is longer than the model's context")
        return kept, len(kept) - behind

    def _scored(
        self, texts: Sequence[tuple[list[int], int]], size: int
    ) -> list[tuple[float, bool]]:
        width = bucket_prompt(max(len(ids) for ids, _ in texts))
        width = min(width, self._model.config.context_length)
        answer = bucket_prompt(max(len(ids) - context for ids, context in texts))
        tokens = np.zeros((size, width), np.int32)
        contexts, lengths = np.ones(size, np.int32), np.ones(size, np.int32)
        for row, (ids, context) in enumerate(texts):
            tokens[row, : len(ids)] = ids
            contexts[row], lengths[row] = context, len(ids)
        with self._model.on_mesh():
            scores, likeliest = jax.device_get(
                _score(
                    self._model.params,
                    jnp.asarray(tokens),
                    jnp.asarray(contexts),
                    jnp.asarray(lengths),
                    self._cycles,
                    min(answer, width),
                )
            )
        found = []
        for row, (ids, context) in enumerate(texts):
            here = slice(0, len(ids) - context)
            found.append((float(scores[row, here].sum()), bool(likeliest[row, here].all())))
        return found


@functools.partial(jax.jit, static_argnums=(4, 5))
def _score(
    params: Parameters,
    tokens: Int[Array, "B T"],
    contexts: Int[Array, " B"],
    lengths: Int[Array, " B"],
    cycles: CycleConfig | None,
    width: int,
) -> tuple[jax.Array, jax.Array]:
    """[B, width] log-probabilities of the tokens behind each context, and whether likeliest."""
    hidden = decoded_hidden(params, unpacked(tokens, contexts, lengths), cycles)
    rows = contexts[:, None] - 1 + jnp.arange(width, dtype=jnp.int32)[None, :]
    last = tokens.shape[1] - 1
    x = jnp.take_along_axis(hidden, jnp.minimum(rows, last)[:, :, None], axis=1)
    targets = jnp.take_along_axis(tokens, jnp.minimum(rows + 1, last), axis=1)
    logits = unembed(params, x)
    own = jnp.take_along_axis(logits, targets[:, :, None], axis=-1)[..., 0]
    return own - jax.nn.logsumexp(logits, axis=-1), jnp.argmax(logits, axis=-1) == targets
