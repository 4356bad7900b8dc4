"""What holds in every test: eight simulated devices, no network, strict JAX, repeatable examples.

The environment is set before JAX is imported; child processes inherit it. jaxtyping and beartype
are switched on by `--jaxtyping-packages` in pyproject.toml; hence nothing here imports `mtd_jax`.
"""

import os

DEVICES = 8

os.environ.setdefault("JAX_PLATFORMS", "cpu")
# Eight devices on two cores: a collective may wait long for a device whose thread is not scheduled.
# XLA ends the process after 40 seconds of that; here only pytest's limit counts.
os.environ["XLA_FLAGS"] = " ".join(
    [
        os.environ.get("XLA_FLAGS", ""),
        f"--xla_force_host_platform_device_count={DEVICES}",
        "--xla_cpu_collective_call_terminate_timeout_seconds=1200",
        "--xla_cpu_collective_timeout_seconds=1200",
    ]
).strip()
os.environ.update(
    HF_HUB_OFFLINE="1",
    HF_HUB_DISABLE_TELEMETRY="1",
    HF_HUB_DISABLE_PROGRESS_BARS="1",
    TRANSFORMERS_OFFLINE="1",
    TOKENIZERS_PARALLELISM="false",
)

from collections.abc import Iterator  # noqa: E402  (after the environment)

import jax  # noqa: E402
import pytest  # noqa: E402
from hypothesis import settings  # noqa: E402

# A missing axis broadcasts silently and mixed dtypes promote silently: here both raise. Products in
# full precision make CPU and GPU comparable (no TF32).
jax.config.update("jax_platforms", os.environ["JAX_PLATFORMS"])
jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_default_matmul_precision", "highest")
# One program at a time: two in flight can each hold threads that the other's collectives wait for.
jax.config.update("jax_cpu_enable_async_dispatch", False)

# The same examples in every run; compilation makes single examples slow, so there is no deadline.
settings.register_profile("deterministic", derandomize=True, deadline=None)
settings.load_profile("deterministic")


@pytest.fixture(autouse=True)
def _release_programs() -> Iterator[None]:
    """A worker compiles thousands of programs, and may not keep the memory maps of all of them."""
    yield
    from mtd_jax.backend import release_programs  # not before jaxtyping's hook is there

    release_programs()
