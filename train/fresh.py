"""A model of random weights that reads bytes, to be trained from nothing.

    python -m train.fresh --shape configs/models/byte-6m.toml --out models/byte-6m

The shape file says all but the weights; tokens are the 256 bytes and an end token.
"""

from __future__ import annotations

from pathlib import Path

import jax

from mtd_jax import parameters
from mtd_jax.cli.page import make_parser, run
from mtd_jax.config import ModelConfig, read_shape
from mtd_jax.convert.conversions import save_native
from mtd_jax.convert.fingerprint import fingerprint
from mtd_jax.decoding.language_model import LanguageModel
from mtd_jax.errors import InputError
from mtd_jax.tokenizer import Tokenizer
from mtd_jax.transformer.model import declare

END = "<|end|>"


def byte_tokenizer(config: ModelConfig) -> Tokenizer:
    """A token for every byte, and the end token behind them."""
    from tokenizers import Tokenizer as Backend
    from tokenizers import decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    if config.vocab_size <= len(alphabet) or config.eos_token_ids != (len(alphabet),):
        raise InputError(
            f"a model of bytes has a vocabulary over {len(alphabet)} and eos_token_ids = "
            f"[{len(alphabet)}], got {config.vocab_size} and {list(config.eos_token_ids)}"
        )
    backend = Backend(models.BPE(vocab={byte: i for i, byte in enumerate(alphabet)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    return Tokenizer(PreTrainedTokenizerFast(tokenizer_object=backend, eos_token=END))


def write_fresh(config: ModelConfig, out: Path, seed: int) -> int:
    """Draws the weights and writes the model; returns how many parameters it has.

    Raises:
      InputError: the shape is not that of a model of bytes; `out` is there already.
    """
    tokenizer = byte_tokenizer(config)
    params = parameters.initialize(declare(config), jax.random.key(seed))
    source = f"random weights, seed {seed}"
    save_native(LanguageModel(params, tokenizer, None, fingerprint(params), source), out)
    return parameters.count(params)


def main() -> None:
    """Says how many weights were drawn."""
    parser = make_parser(__doc__)
    parser.add_argument("--shape", required=True, type=Path, metavar="FILE.toml")
    parser.add_argument("--out", required=True, type=Path, metavar="DIR")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    count = write_fresh(read_shape(args.shape), args.out, args.seed)
    print(f"{args.out}: {count:,} parameters")


if __name__ == "__main__":
    run(main, "fresh.py")
