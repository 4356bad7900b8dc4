"""torch is a test dependency: nothing that a user runs imports it, even where it is installed."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from tests.support.checkpoints import hf_config, write_hf
from tests.support.command_line import environment
from tests.support.tokenizers import byte_level

_PROGRAM = """
import sys
import mtd_jax as mtd
model = mtd.load(sys.argv[1])
done = mtd.generate(model, mtd.methods.autoregressive(), "hello", max_new_tokens=2)
assert len(done[0].token_ids) == 2
assert "torch" not in sys.modules
"""


def test_loading_and_generating_leaves_torch_alone(tmp_path: Path) -> None:
    path = write_hf(tmp_path / "model", hf_config(vocab_size=400, eos_token_id=399))
    byte_level().save(path)
    done = subprocess.run(
        [sys.executable, "-c", _PROGRAM, str(path)],
        capture_output=True,
        text=True,
        env=environment(),
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
