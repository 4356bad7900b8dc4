"""Time, with compilation counted apart.

A speed that contains compilation says nothing about decoding, and a compilation after warm-up is a
bug; both are read from JAX's own monitoring events.
"""

from __future__ import annotations

import time
from types import TracebackType

from jax import monitoring

_TIMED = (
    "/jax/core/compile/jaxpr_trace_duration",
    "/jax/core/compile/jaxpr_to_mlir_module_duration",
    "/jax/core/compile/backend_compile_duration",
)
_COMPILED = "/jax/core/compile/backend_compile_duration"


class Clock:
    """Context manager; while it is open, counts compilations and adds up their seconds."""

    def __init__(self) -> None:
        self.compilations = 0
        """Programs compiled or taken from the persistent cache."""
        self._spans: list[tuple[float, float]] = []
        self._began = 0.0
        self._ended: float | None = None

    @property
    def compile_seconds(self) -> float:
        """Time spent tracing, lowering and compiling."""
        return sum(end - begin for begin, end in self._spans)

    @property
    def seconds(self) -> float:
        """Wall time without compilation, so far or until it was closed."""
        now = time.perf_counter() if self._ended is None else self._ended
        return max(0.0, now - self._began - self.compile_seconds)

    def __enter__(self) -> Clock:
        monitoring.register_event_duration_secs_listener(self._heard)
        self._began = time.perf_counter()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._ended = time.perf_counter()
        monitoring.unregister_event_duration_listener(self._heard)

    def _heard(self, event: str, duration_secs: float, **kwargs: str | int) -> None:
        if event in _TIMED:
            end = time.perf_counter()
            begin = end - duration_secs
            # Tracing one function traces those it calls: the outer span swallows the inner ones.
            while self._spans and self._spans[-1][0] >= begin:
                self._spans.pop()
            self._spans.append((begin, end))
        if event == _COMPILED:
            self.compilations += 1
