"""What a run cost and brought, under the names of docs/metrics.md."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from mtd_jax.decoding.clock import Clock


@dataclasses.dataclass(frozen=True)
class Metrics:
    """Figures of one prompt or of many; seconds contain neither compilation nor printing."""

    tokens: int = 0
    """New tokens."""
    seconds: float = 0.0
    """Wall time in the engine: reading the prompt and decoding."""
    prompt_seconds: float = 0.0
    """The part of it up to the first token."""
    compile_seconds: float = 0.0
    """Compilation beside it: 0 after warm-up."""

    @property
    def tokens_per_second(self) -> float:
        """All new tokens over all seconds, the prompt's included."""
        return self.tokens / self.seconds if self.seconds > 0 else 0.0

    @property
    def decode_tokens_per_second(self) -> float:
        """Tokens behind the first over the seconds behind it: the speed of the loop alone."""
        seconds = self.seconds - self.prompt_seconds
        return (self.tokens - 1) / seconds if self.tokens > 1 and seconds > 0 else 0.0

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

    def of_tokens(self, tokens: int) -> Metrics:
        """The same times for this many tokens."""
        return dataclasses.replace(self, tokens=tokens)

    def to_dict(self) -> dict[str, float | int]:
        """JSON-ready values."""
        return {
            "tokens": self.tokens,
            "seconds": round(self.seconds, 6),
            "tokens_per_second": round(self.tokens_per_second, 3),
            "decode_tokens_per_second": round(self.decode_tokens_per_second, 3),
            "prompt_seconds": round(self.prompt_seconds, 6),
            "compile_seconds": round(self.compile_seconds, 6),
        }


def total(parts: Sequence[Metrics], batch_size: int) -> Metrics:
    """Sum over a run whose prompts were decoded `batch_size` at a time, in order.

    The prompts of a batch ran side by side: their tokens add up, their seconds do not.
    """
    batches = [parts[i : i + batch_size] for i in range(0, len(parts), batch_size)]
    return Metrics(
        tokens=sum(p.tokens for p in parts),
        seconds=sum(max(p.seconds for p in batch) for batch in batches),
        prompt_seconds=sum(max(p.prompt_seconds for p in batch) for batch in batches),
        compile_seconds=sum(max(p.compile_seconds for p in batch) for batch in batches),
    )
