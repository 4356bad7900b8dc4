"""What holds in every test: eight simulated devices, no network, strict JAX, repeatable examples.

The environment is set before JAX is imported; child processes inherit it. jaxtyping and beartype
are switched on by `--jaxtyping-packages` in pyproject.toml; hence nothing here imports `mtd_jax`.
"""

import atexit
import importlib.metadata
import os
import shutil
import tempfile

DEVICES = 8

os.environ.setdefault("JAX_PLATFORMS", "cpu")
# Most of the time of the tests was LLVM's, optimising programs that run a few times on tiny shapes;
# without that they take 0.6 of it. What XLA makes of a program, its memory and its products are the
# same. Commands in processes of their own inherit it; tests marked `optimized` are left out.
os.environ["JAX_DISABLE_MOST_OPTIMIZATIONS"] = "1"
# The emitters that jax 0.10 began to use take twice the time of those before them; with 0.12 there
# is no choice any more, and an unknown flag ends the process.
EMITTERS = "--xla_cpu_use_fusion_emitters=false"
if not importlib.metadata.version("jaxlib").startswith("0.10."):
    EMITTERS = ""
# The code of a program in one part: small programs take a tenth less time than in many.
WHOLE = "--xla_cpu_parallel_codegen_split_count=1"
# Eight devices on two cores: a collective may wait long for a device whose thread is not scheduled.
# XLA ends the process after 40 seconds of that; here only pytest's limit counts.
os.environ["XLA_FLAGS"] = " ".join(
    [
        EMITTERS,
        WHOLE,
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
# One cache for the workers of a run and for the commands that they start: most runs of a training
# test compile what another has compiled. It begins empty, so that no run depends on another.
if "PYTEST_XDIST_WORKER" not in os.environ:
    os.environ["MTD_CACHE_DIR"] = tempfile.mkdtemp(prefix="mtd-tests-")
    atexit.register(shutil.rmtree, os.environ["MTD_CACHE_DIR"], ignore_errors=True)

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
jax.config.update("jax_compilation_cache_dir", os.path.join(os.environ["MTD_CACHE_DIR"], "xla"))
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)

# The same examples in every run; compilation makes single examples slow, so there is no deadline.
settings.register_profile("deterministic", derandomize=True, deadline=None)
settings.load_profile("deterministic")


@pytest.fixture(autouse=True)
def _optimized(request: pytest.FixtureRequest) -> Iterator[None]:
    """Some tests are quicker with optimised programs, or are about those that users run."""
    plain = request.node.get_closest_marker("optimized") is None
    jax.config.update("jax_disable_most_optimizations", plain)
    yield
    jax.config.update("jax_disable_most_optimizations", True)


@pytest.fixture(autouse=True)
def _release_programs() -> Iterator[None]:
    """A worker compiles thousands of programs, and may not keep the memory maps of all of them.

    Early enough that the engine does not forget any in the middle of a test that counts them.
    """
    yield
    from mtd_jax.backend import release_programs  # not before jaxtyping's hook is there

    release_programs(share=0.4)
