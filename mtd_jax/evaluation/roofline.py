"""The limit that decoding runs against: reading the weights from memory once a step.

A speed-up means little without it, because a slow baseline is easy to beat. The share of the
roofline is bytes read per second over the memory bandwidth that this machine shows when it does
nothing but read.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import jax
import jax.numpy as jnp
import numpy as np

_CPU_BYTES = 2**29
_DEVICE_BYTES = 2**32
_TRIALS = 5


def memory_bandwidth() -> float:
    """Bytes per second that one device reads: the best of a few passes over a large array."""
    if jax.default_backend() == "cpu":
        return _best_rate(*_cpu_reader())
    return _best_rate(*_device_reader())


def _best_rate(read: Callable[[], object], size: int) -> float:
    read()
    best = float("inf")
    for _ in range(_TRIALS):
        began = time.perf_counter()
        read()
        best = min(best, time.perf_counter() - began)
    return size / best


def _cpu_reader() -> tuple[Callable[[], object], int]:
    # XLA's reductions on CPU are bound by arithmetic; numpy's integer maximum is bound by memory.
    threads = len(os.sched_getaffinity(0))
    parts = np.array_split(np.ones(_CPU_BYTES // 4, np.int32), threads)
    pool = ThreadPoolExecutor(threads)
    return lambda: list(pool.map(np.max, parts)), _CPU_BYTES


def _device_reader() -> tuple[Callable[[], object], int]:
    array = jnp.ones((_DEVICE_BYTES // 4,), jnp.float32)
    total = jax.jit(jnp.sum)
    return lambda: total(array).block_until_ready(), _DEVICE_BYTES
