"""The real model, which `make test` fetches before the tests run."""

from __future__ import annotations

from pathlib import Path

import pytest

_MODELS = Path(__file__).parents[2] / "models"


def model_directory() -> Path:
    """SmolLM2-135M-Instruct as a native checkpoint; fails where it has not been fetched."""
    return _existing(_MODELS / "smollm2-135m-instruct")


def gguf_file() -> Path:
    """The GGUF file that the checkpoint was made from; fails where it has not been fetched."""
    return _existing(_MODELS / "SmolLM2-135M-Instruct.Q4_1.gguf")


def _existing(path: Path) -> Path:
    if not path.exists():
        pytest.fail(f"{path} is not there: `make models` fetches it")
    return path
