"""Host memory that conversions take, as a multiple of the weights (measured: 1.1 and 1.2)."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from tests.support.checkpoints import hf_config, hf_shapes, write_hf
from tests.support.command_line import environment

# What importing and the first compilation take is there before the conversion starts.
_MEASURE = """
import json, resource, sys
from pathlib import Path
import jax, orbax.checkpoint, transformers
from mtd_jax.convert import conversions, load
jax.block_until_ready(jax.numpy.ones(3) + 1)
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
kind, source, out = sys.argv[1:]
before = peak()
if kind == "load":
    load.load_as_stored(source)
else:
    getattr(conversions, kind)(Path(source), Path(out))
print(json.dumps(peak() - before))
"""


def peak_bytes(kind: str, source: Path, out: Path) -> int:
    done = subprocess.run(
        [sys.executable, "-c", _MEASURE, kind, str(source), str(out)],
        capture_output=True,
        text=True,
        env=environment(),
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return int(json.loads(done.stdout))


@pytest.mark.slow
def test_conversions_hold_the_weights_once(tmp_path: Path) -> None:
    config = hf_config(
        hidden_size=1024,
        intermediate_size=4096,
        num_hidden_layers=6,
        num_attention_heads=16,
        num_key_value_heads=8,
        head_dim=64,
        vocab_size=16_000,
    )
    rng = np.random.default_rng(0)
    tensors = {n: rng.standard_normal(s, np.float32) for n, s in hf_shapes(config).items()}
    size = sum(values.nbytes for values in tensors.values())
    write_hf(tmp_path / "source", config, tensors, shards=3)
    del tensors
    assert peak_bytes("to_native", tmp_path / "source", tmp_path / "native") < 1.3 * size
    assert peak_bytes("load", tmp_path / "native", tmp_path) < 1.3 * size
    assert peak_bytes("to_huggingface", tmp_path / "native", tmp_path / "back") < 1.4 * size
