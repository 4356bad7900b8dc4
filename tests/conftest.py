"""What holds in every test: eight simulated devices, no network, strict JAX, repeatable examples.

The environment is set before JAX is imported; child processes inherit it. jaxtyping and beartype
are switched on by `--jaxtyping-packages` in pyproject.toml; hence nothing here imports `mtd_jax`.
"""

import os

DEVICES = 8

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ["XLA_FLAGS"] = (
    f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={DEVICES}".strip()
)
os.environ.update(
    HF_HUB_OFFLINE="1",
    HF_HUB_DISABLE_TELEMETRY="1",
    HF_HUB_DISABLE_PROGRESS_BARS="1",
    TRANSFORMERS_OFFLINE="1",
    TOKENIZERS_PARALLELISM="false",
)

import jax  # noqa: E402  (after the environment)
from hypothesis import settings  # noqa: E402

# A missing axis broadcasts silently and mixed dtypes promote silently: here both raise. Products in
# full precision make CPU and GPU comparable (no TF32).
jax.config.update("jax_platforms", os.environ["JAX_PLATFORMS"])
jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_default_matmul_precision", "highest")

# The same examples in every run; compilation makes single examples slow, so there is no deadline.
settings.register_profile("deterministic", derandomize=True, deadline=None)
settings.load_profile("deterministic")
