"""Published Medusa heads: the layout of the original repository, and vLLM's.

| ours             | original            | vLLM                       |
|------------------|---------------------|----------------------------|
| weight[:, i] (T) | {i}.0.linear.weight | blocks.{i}.layers.0.weight |
| bias[i]          | {i}.0.linear.bias   | blocks.{i}.layers.0.bias   |
| output[i] (T)    | {i}.1.weight        | lm_heads.{i}.weight        |

Both keep an output matrix for every head, so heads that share the base's are written with copies of
it; copies that are the base's own are not told apart when they are read. vLLM may leave out biases
(zero), and may keep one `lm_head.weight` for all.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Literal, TypeAlias

import jax.numpy as jnp
import numpy as np

from mtd_jax.convert.atomic import atomic_directory
from mtd_jax.convert.safetensors_files import (
    SafetensorsFiles,
    open_safetensors,
    read_header,
    write_safetensors,
)
from mtd_jax.convert.tensor_source import check_finite
from mtd_jax.decoding.heads import Heads
from mtd_jax.decoding.language_model import LanguageModel
from mtd_jax.errors import InputError, listed
from mtd_jax.methods import make_spec
from mtd_jax.methods.medusa import MedusaWeights

Layout: TypeAlias = Literal["original", "vllm"]
LAYOUTS: dict[Layout, tuple[str, str, str]] = {
    "original": ("{}.0.linear.weight", "{}.0.linear.bias", "{}.1.weight"),
    "vllm": ("blocks.{}.layers.0.weight", "blocks.{}.layers.0.bias", "lm_heads.{}.weight"),
}
"""Names of a head's weight, bias and output matrix."""
FILES: dict[Layout, str] = {"original": "medusa_lm_head.safetensors", "vllm": "model.safetensors"}
_ONE_OUTPUT = "lm_head.weight"


def read_medusa(source: Path, base: LanguageModel) -> Heads:
    """Published heads, for the model that they are to draft for.

    Args:
      source: a safetensors file, or a directory with one.

    Raises:
      InputError: nothing there, pickles alone, another layout, heads of more than one block, or
        shapes that are not the base's.
    """
    if not source.exists():
        raise InputError(f"no heads at {source}")
    if source.is_file() and source.suffix != ".safetensors":
        raise InputError(
            f"{source} is no .safetensors file; pickled weights (.pt) can run code when they are "
            "read: convert them to safetensors first"
        )
    files = open_safetensors(source) if source.is_dir() else SafetensorsFiles(read_header(source))
    names = set(files.names())
    layout = _layout(source, names)
    weight, bias, output = LAYOUTS[layout]
    count = 0
    while weight.format(count) in names:
        count += 1
    outputs = [output.format(i) for i in range(count)]
    if not names.issuperset(outputs) and _ONE_OUTPUT in names:
        outputs = [_ONE_OUTPUT] * count
    biases = [bias.format(i) for i in range(count)]
    optional = biases if layout == "vllm" and not names.intersection(biases) else []
    needed = [*(weight.format(i) for i in range(count)), *biases, *outputs]
    _check_names(source, files, needed, optional)
    width, vocab = base.config.hidden_size, base.config.vocab_size

    def read(name: str, *shape: int) -> np.ndarray:
        if files.shape(name) != shape:
            raise InputError(
                f"{source}: '{name}' is {list(files.shape(name))}, not {list(shape)} as for the "
                "base model"
            )
        values = np.array(files.read(name, tuple(slice(0, size) for size in shape)))
        check_finite(values, f"{source}: '{name}'")
        return values

    weights = np.stack([read(weight.format(i), width, width).T for i in range(count)], axis=1)
    zeros = np.zeros((width,), weights.dtype)
    bias_rows = [zeros if optional else read(name, width) for name in biases]
    matrices = [read(name, vocab, width).T for name in outputs]
    options = {"count": count, "own_output": True}
    make_spec("medusa", options)
    return Heads(
        method="medusa",
        options=options,
        base=base.fingerprint,
        weights=MedusaWeights(
            weight=jnp.asarray(weights),
            bias=jnp.asarray(np.stack(bias_rows)),
            output=tuple(jnp.asarray(m) for m in matrices),
        ),
        record={"source": f"Medusa heads {source.name}, {layout} layout"},
    )


def write_medusa(
    heads: Heads, base: LanguageModel, out: Path, layout: Layout, *, force: bool = False
) -> None:
    """Writes a directory that the original repository, or vLLM, reads.

    Raises:
      InputError: heads of another method, or `out` cannot be written.
    """
    if heads.method != "medusa":
        raise InputError(f"these heads are for method '{heads.method}', not 'medusa'")
    weights: MedusaWeights = heads.weights
    count, width = weights.bias.shape
    if layout == "original":
        config = {"medusa_num_heads": count, "medusa_num_layers": 1}
    else:
        config = {
            "model_type": "medusa",
            "architectures": ["MedusaModel"],
            "hidden_size": width,
            "vocab_size": base.config.vocab_size,
            "num_heads": count,
            "num_hidden_layers": 1,
            "medusa_fc_bias": True,
        }
    with atomic_directory(out, force=force) as work:
        write_safetensors(work / FILES[layout], list(_tensors(weights, base, layout)))
        (work / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def _tensors(
    weights: MedusaWeights, base: LanguageModel, layout: Layout
) -> Iterator[tuple[str, np.ndarray]]:
    weight, bias, output = LAYOUTS[layout]
    params = base.params
    shared = params.embedding if params.config.tie_embeddings else params.head.T
    for i in range(weights.bias.shape[0]):
        dtype = weights.bias.dtype
        matrix = weights.output[i].T if weights.output else shared.astype(dtype)
        yield weight.format(i), np.asarray(weights.weight[:, i].T)
        yield bias.format(i), np.asarray(weights.bias[i])
        yield output.format(i), np.asarray(matrix)


def _layout(source: Path, names: set[str]) -> Layout:
    for layout, (weight, _, _) in LAYOUTS.items():
        if weight.format(0) in names:
            return layout
    raise InputError(
        f"{source} holds no Medusa heads: neither '{LAYOUTS['original'][0].format(0)}' nor "
        f"'{LAYOUTS['vllm'][0].format(0)}' is there"
    )


def _check_names(
    source: Path, files: SafetensorsFiles, needed: list[str], optional: list[str]
) -> None:
    names = set(files.names())
    missing = sorted(set(needed) - names - set(optional))
    more = [name[:80] for name in sorted(names - set(needed))]
    found = [f"{what}: {listed(which)}" for what, which in files.problems().items() if which]
    if missing:
        found.append(f"it lacks {listed(missing)}")
    if more:
        found.append(f"it holds {listed(more)} as well: heads of one block each are supported")
    if found:
        raise InputError(f"{source} cannot be read; {'; '.join(found)}")
