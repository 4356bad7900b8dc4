"""`python -m mtd_jax.cli`, for where the script `mtd` is not on the path."""

import sys

from mtd_jax.cli.main import main

sys.exit(main())
