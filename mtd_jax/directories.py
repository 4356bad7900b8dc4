"""Where files are kept that can be made anew."""

from __future__ import annotations

import os
from pathlib import Path


def cache_directory() -> Path:
    """`$MTD_CACHE_DIR`, else `$XDG_CACHE_HOME/mtd-jax`, else `~/.cache/mtd-jax`."""
    home = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    return Path(os.environ.get("MTD_CACHE_DIR") or str(Path(home) / "mtd-jax"))
