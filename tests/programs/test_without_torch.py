"""torch is a test dependency: nothing that a user runs imports it, even where it is installed."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from tests.support.checkpoints import hf_config, write_hf
from tests.support.command_line import environment
from tests.support.tokenizers import byte_level
from tests.support.vocabularies import LLAMA2, write_byte_level, write_sentencepiece

_PROGRAM = """
import sys
import mtd_jax as mtd
model = mtd.load(sys.argv[1])
done = mtd.generate(model, mtd.methods.autoregressive(), "hello", max_new_tokens=2)
assert len(done[0].token_ids) == 2
assert "torch" not in sys.modules
"""
_LOAD = """
import sys
from mtd_jax.tokenizer import Tokenizer
for directory in sys.argv[1:]:
    tokenizer = Tokenizer.load(directory)
    assert tokenizer.decode(tokenizer.encode("in there")) == "in there", directory
    assert "torch" not in sys.modules, directory
"""


def _run(program: str, *words: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", program, *map(str, words)],
        capture_output=True,
        text=True,
        env=environment(),
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]


def test_loading_and_generating_leaves_torch_alone(tmp_path: Path) -> None:
    path = write_hf(tmp_path / "model", hf_config(vocab_size=400, eos_token_id=399))
    byte_level().save(path)
    _run(_PROGRAM, path)


def test_tokenizers_without_a_tokenizer_json_leave_torch_alone(tmp_path: Path) -> None:
    """AutoTokenizer, which finds the class of such directories, imports it."""
    llama, qwen = {"model_type": "llama"}, {"model_type": "qwen2"}
    _run(
        _LOAD,
        write_sentencepiece(tmp_path / "named", config=llama, tokenizer_config=LLAMA2),
        write_sentencepiece(tmp_path / "unnamed", config=llama),
        write_byte_level(tmp_path / "qwen", config=qwen),
    )
