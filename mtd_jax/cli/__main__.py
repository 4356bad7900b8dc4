"""`python -m mtd_jax.cli`, for where the script `mtd` is not on the path."""

from mtd_jax.cli.main import script

script()
