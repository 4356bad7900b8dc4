r"""What methods that copy would have drafted while known answers were written: no model runs.

    mtd distill-data --model models/smollm2-135m-instruct --prompts benchmarks/prompts/smoke.jsonl \
        --temperatures 0 --max-new-tokens 128 --batch-size 4 --out answers.jsonl
    python -m benchmarks.replay answers.jsonl --out benchmarks/results/replay.json

By kind of draft, how often it is right: what `_CHANCES` in `methods/copying.py` was rounded from.
And what `auto` gains with them where steps cost what `COSTS` says: what the constants of
`methods/copying.py` and `decoding/adaptive.py` were compared by. Proposals, choices and adaptation
are the methods' own.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.shapes import whole_numbers
from mtd_jax import methods
from mtd_jax.cli.page import make_parser, run
from mtd_jax.convert.atomic import write_file
from mtd_jax.decoding.matching import KINDS
from mtd_jax.decoding.method import DecodeState, Requests, Tally
from mtd_jax.decoding.sampling import Sampling, SamplingRows
from mtd_jax.errors import InputError
from mtd_jax.evaluation import environment
from mtd_jax.training.sources import place, read_documents
from mtd_jax.transformer.cache import KVCache

METHODS: dict[str, Callable[[], Any]] = {
    "ngram": methods.ngram,
    "prompt_lookup": methods.prompt_lookup,
}
COSTS = {"few_rows": (1.0, 1.11, 1.32, 2.03), "xla": (1.0, 1.51, 2.07, 2.44)}
"""Of steps of 1, 4, 8 and 16 rows by what multiplies them, of `cpu-verify-cost`."""
POSITIONS = 32


class Answer(NamedTuple):
    """One line of `mtd distill-data`."""

    tokens: np.ndarray
    """[T]: the prompt and what was answered."""
    prompt: int
    """How many of them are the prompt."""


def main() -> None:
    """Counts, replays, prints, writes."""
    parser = make_parser(__doc__)
    parser.add_argument("answers", type=Path, help="of `mtd distill-data --temperatures 0`")
    parser.add_argument("--batch-sizes", type=whole_numbers, default=[1, 4])
    parser.add_argument("--max-new-tokens", type=int, default=128, help="that were asked for")
    parser.add_argument(
        "--measured",
        type=float,
        default=1.0,
        help="share of a step's cost over one row's that is known",
    )
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    answers = read_answers(args.answers)
    rows = []
    for name, make in METHODS.items():
        method = make()
        gains = []
        for products, size in itertools.product(COSTS, args.batch_sizes):
            gain = replay(
                _believing(method, COSTS[products], args.measured),
                COSTS[products],
                answers,
                batch_size=size,
                max_new_tokens=args.max_new_tokens,
            )
            gains.append({"costs": products, "batch_size": size, **gain})
        rows.append({"method": name, "kinds": kinds(method, answers), "replays": gains})
        print(json.dumps(rows[-1]), flush=True)
    result = {
        "versions": environment.versions(),
        **environment.provenance(),
        "answers": {
            "prompts": len(answers),
            "tokens": sum(len(a.tokens) - a.prompt for a in answers),
        },
        "costs": COSTS,
        "measured": args.measured,
        "rows": rows,
    }
    if args.out is not None:
        write_file(args.out, json.dumps(result, indent=1) + "\n")


def read_answers(path: Path) -> list[Answer]:
    """Those of a file of `mtd distill-data`."""
    answers = []
    for document in read_documents(path):
        written = document.answer or ()
        if document.token_ids is None or True not in written:
            where = place(path, document.line)
            raise InputError(f"{where}: an answer of `mtd distill-data` is needed")
        answers.append(Answer(np.asarray(document.token_ids, np.int32), written.index(True)))
    return answers


def kinds(method: Any, answers: list[Answer]) -> list[dict[str, Any]]:
    """Drafts of each kind behind every token of the answers, as long as they are right."""
    tried, right = np.zeros((2, KINDS * (method.longest + 1)), np.int64)
    for answer in answers:
        places = np.arange(answer.prompt + 1, len(answer.tokens))
        text = _padded([answer.tokens] * POSITIONS)
        for first in range(0, len(places), POSITIONS):
            some = places[first : first + POSITIONS]
            # Always as many, so that one program serves; those that are repeated do not count.
            state = state_of(text, np.resize(some, POSITIONS), np.ones(POSITIONS))
            drafts, kind = jax.device_get(_propose(method, state))
            for at, row, found in zip(some, drafts, kind, strict=False):
                followed = answer.tokens[at:]
                count = _right(row, followed)
                seen = found[: min(count + 1, len(followed))]
                np.add.at(tried, seen[seen > 0], 1)
                np.add.at(right, seen[:count], 1)
    agree = ("half or fewer", "the only one", "most", "all")
    return [
        {"match": k // KINDS, "agree": agree[k % KINDS], "drafts": int(tried[k]), "right": int(r)}
        for k, r in enumerate(right)
        if tried[k]
    ]


def replay(
    method: Any,
    costs: tuple[float, ...],
    answers: list[Answer],
    *,
    batch_size: int,
    max_new_tokens: int,
) -> dict[str, Any]:
    """Tokens a pass, and how much faster than plain decoding the passes would have been.

    Args:
      method: with `costs` that it believes in.
      costs: of a step by the method's `sizes`, as they are.
      max_new_tokens: that were asked for; an answer may have ended before.
    """
    tokens, passes, spent, plain = 0, 0, 0.0, 0.0
    for first in range(0, len(answers), batch_size):
        batch = answers[first : first + batch_size]
        text = _padded([a.tokens for a in batch])
        begun = np.array([a.prompt for a in batch])
        ends = np.array([len(a.tokens) for a in batch])
        at = begun + 1  # reading the prompt brings the first token
        plain += costs[0] * max(ends - at)
        rates = method.rates(len(batch))
        while (at < ends).any():
            left = np.where(at < ends, max_new_tokens - (at - begun), 0)
            state = state_of(text, at, left).replace(extra=rates)
            drafts, kind, size = _plan(method, state)
            some = np.asarray(drafts)[:, : method.sizes[int(size)] - 1]
            drafted = np.minimum((some >= 0).sum(axis=1), np.maximum(left - 1, 0))
            followed = [a.tokens[n:] for a, n in zip(batch, at, strict=True)]
            right = [_right(row, behind) for row, behind in zip(some, followed, strict=True)]
            accepted = np.minimum(right, drafted)
            rates = _after(rates, kind, *(jnp.asarray(n, jnp.int32) for n in (drafted, accepted)))
            emitted = np.minimum(accepted + 1, ends - at)
            tokens += int(emitted.sum())
            passes += int((emitted > 0).sum())
            spent += costs[int(size)]
            at = at + emitted
    return {
        "tokens": tokens,
        "passes": passes,
        "tokens_per_pass": round(tokens / max(passes, 1), 3),
        "speedup": round(plain / spent, 3) if spent else None,
    }


def _believing(method: Any, costs: tuple[float, ...], measured: float) -> Any:
    """The method with so much of the costs over one row's."""
    return method.replace(costs=costs[0] + measured * (jnp.asarray(costs, jnp.float32) - costs[0]))


def state_of(text: Any, lengths: Any, wanted: Any) -> DecodeState:
    """A state in which the first so many tokens of each row are known; nothing else is.

    Args:
      text: [B, C] token ids.
      lengths: [B] how many of them are known.
      wanted: [B] tokens that are still wanted.
    """
    batch, capacity = text.shape
    none = jnp.zeros(batch, jnp.int32)
    budget = jnp.asarray(wanted, jnp.int32)
    sampling = SamplingRows.of([Sampling()] * batch)
    cache = KVCache(
        k=jnp.zeros((1, batch, 1, 1, capacity), jnp.float32),
        v=jnp.zeros((1, batch, 1, capacity, 1), jnp.float32),
        length=jnp.asarray(lengths, jnp.int32) - 1,
    )
    return DecodeState(
        cache=cache,
        text=jnp.asarray(text, jnp.int32),
        prompt_length=jnp.ones(batch, jnp.int32),
        pending=none,
        emitted=none[:, None],
        emitted_count=none,
        partial=none,
        drafted=none,
        tally=Tally.empty(batch, 1),
        active=budget > 0,
        requests=Requests(budget, jnp.full(1, -1, jnp.int32), sampling),
    )


def _padded(texts: list[np.ndarray]) -> np.ndarray:
    """Texts in one buffer, of few different sizes."""
    capacity = -(-max(map(len, texts)) // 256) * 256
    return np.stack([np.pad(text, (0, capacity - len(text))) for text in texts])


def _right(drafts: np.ndarray, followed: np.ndarray) -> int:
    """How many drafts at the beginning are what followed."""
    both = min(len(drafts), len(followed))
    wrong = np.flatnonzero(drafts[:both] != followed[:both])
    return int(wrong[0]) if len(wrong) else both


@jax.jit
def _propose(method: Any, state: DecodeState) -> Any:
    return method.propose(state)


@jax.jit
def _plan(method: Any, state: DecodeState) -> Any:
    return method.plan(state)


@jax.jit
def _after(rates: Any, kinds: jax.Array, drafted: jax.Array, accepted: jax.Array) -> Any:
    return rates.after(kinds, drafted, accepted)


if __name__ == "__main__":
    run(main, "replay.py")
