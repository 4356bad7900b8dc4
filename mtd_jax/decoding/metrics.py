"""What a run cost and brought, under the names of docs/metrics.md."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from itertools import zip_longest
from typing import Any

from mtd_jax.decoding.clock import Clock


@dataclasses.dataclass(frozen=True)
class Metrics:
    """Figures of one prompt or of many; seconds contain neither compilation nor printing."""

    prompts: int = 1
    tokens: int = 0
    """New tokens."""
    seconds: float = 0.0
    """Wall time in the engine: reading the prompt and decoding."""
    prompt_seconds: float = 0.0
    """The part of it up to the first token."""
    compile_seconds: float = 0.0
    """Compilation beside it: 0 after warm-up, but see `backend.release_programs`."""
    forwards: int = 0
    """Passes through the whole model that emitted tokens, the prompt's among them."""
    drafted: int = 0
    """Drafts that were verified."""
    histogram: tuple[int, ...] = ()
    """Steps with drafts, by how many of them were accepted: 0, 1, ..., K, the most that a step can
    have; the bonus token is not counted."""
    bytes_read: float = 0.0
    """Weights, keys and values that the steps behind the first token had to read."""

    @property
    def tokens_per_second(self) -> float:
        """All new tokens over all seconds, the prompt's included."""
        return self.tokens / self.seconds if self.seconds > 0 else 0.0

    @property
    def decode_seconds(self) -> float:
        """The seconds behind the first token."""
        return self.seconds - self.prompt_seconds

    @property
    def decode_tokens_per_second(self) -> float:
        """Tokens behind the first over the seconds behind it: the speed of the loop alone."""
        later = self.tokens - self.prompts
        return later / self.decode_seconds if later > 0 and self.decode_seconds > 0 else 0.0

    @property
    def spec_steps(self) -> int:
        """Steps that had drafts."""
        return sum(self.histogram)

    @property
    def accepted(self) -> int:
        """Drafts accepted."""
        return sum(length * steps for length, steps in enumerate(self.histogram))

    @property
    def mean_acceptance_length(self) -> float | None:
        """1 + accepted / steps, steps without drafts left out; None if there was none with."""
        return 1 + self.accepted / self.spec_steps if self.spec_steps else None

    @property
    def per_position_acceptance(self) -> list[float]:
        """How often the draft at each position was accepted, of all steps with drafts."""
        steps = self.spec_steps
        behind = [sum(self.histogram[i:]) for i in range(1, len(self.histogram))]
        return [count / steps for count in behind] if steps else []

    def with_prompt(self, clock: Clock) -> Metrics:
        """Adds the call that read the prompt."""
        return dataclasses.replace(
            self,
            seconds=self.seconds + clock.seconds,
            prompt_seconds=self.prompt_seconds + clock.seconds,
            compile_seconds=self.compile_seconds + clock.compile_seconds,
        )

    def with_steps(self, clock: Clock) -> Metrics:
        """Adds a call that decoded."""
        return dataclasses.replace(
            self,
            seconds=self.seconds + clock.seconds,
            compile_seconds=self.compile_seconds + clock.compile_seconds,
        )

    def to_dict(self, bandwidth: float | None = None) -> dict[str, Any]:
        """JSON-ready values; with the memory's `bandwidth` in bytes a second, the share of it."""
        later = self.tokens - self.prompts
        possible = bandwidth * self.decode_seconds if bandwidth is not None else 0.0
        share = {} if bandwidth is None else {"roofline_share": _rounded(self.bytes_read, possible)}
        return share | {
            "tokens": self.tokens,
            "seconds": round(self.seconds, 6),
            "tokens_per_second": round(self.tokens_per_second, 3),
            "decode_tokens_per_second": round(self.decode_tokens_per_second, 3),
            "prompt_seconds": round(self.prompt_seconds, 6),
            "compile_seconds": round(self.compile_seconds, 6),
            "tokens_per_forward": _rounded(self.tokens, self.forwards),
            "bytes_read_per_token": round(self.bytes_read / later) if later > 0 else None,
            "mean_acceptance_length": _rounded(self.accepted + self.spec_steps, self.spec_steps),
            "draft_acceptance_rate": _rounded(self.accepted, self.drafted),
            "acceptance_histogram": list(self.histogram),
            "per_position_acceptance": [round(x, 4) for x in self.per_position_acceptance],
            "num_spec_steps": self.spec_steps,
            "num_accepted_draft_tokens": self.accepted,
            "num_draft_tokens": self.drafted,
        }


def total(parts: Sequence[Metrics], batch_size: int) -> Metrics:
    """Sum over a run whose prompts were decoded `batch_size` at a time, in order.

    The prompts of a batch ran side by side: their tokens add up, their seconds and the bytes that
    were read for all of them do not.
    """
    batches = [parts[i : i + batch_size] for i in range(0, len(parts), batch_size)]
    columns = zip_longest(*(p.histogram for p in parts), fillvalue=0)
    return Metrics(
        prompts=sum(p.prompts for p in parts),
        tokens=sum(p.tokens for p in parts),
        seconds=sum(max(p.seconds for p in batch) for batch in batches),
        prompt_seconds=sum(max(p.prompt_seconds for p in batch) for batch in batches),
        compile_seconds=sum(max(p.compile_seconds for p in batch) for batch in batches),
        forwards=sum(p.forwards for p in parts),
        drafted=sum(p.drafted for p in parts),
        histogram=tuple(sum(column) for column in columns),
        bytes_read=sum(max(p.bytes_read for p in batch) for batch in batches),
    )


def _rounded(amount: float, parts: float) -> float | None:
    return round(amount / parts, 4) if parts else None
