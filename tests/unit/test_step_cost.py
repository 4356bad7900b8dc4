"""What steps cost, measured by the methods that choose by it."""

from __future__ import annotations

import numpy as np
import pytest

from mtd_jax import calibrated, methods
from mtd_jax.errors import InputError
from mtd_jax.evaluation.step_cost import measure
from tests.support import tiny


def test_a_method_without_a_choice_is_left_alone() -> None:
    model = tiny.language_model()
    for method in (methods.autoregressive(), methods.ngram(drafts=3)):
        assert calibrated(model, method) is method
    with pytest.raises(InputError, match="batch_size"):
        calibrated(model, methods.ngram(), batch_size=0)


def test_every_size_is_measured() -> None:
    model, method = tiny.language_model(), methods.ngram()
    assert len(measure(model, method)) == len(method.sizes)
    fitted = calibrated(model, method, batch_size=2)
    assert fitted.sizes == method.sizes
    assert np.all(np.asarray(fitted.costs) > 0)
