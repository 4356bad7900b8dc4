"""GGUF files: quantised checkpoints of llama.cpp, dequantised to floats.

Config and tokenizer come from the file's metadata.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jax.sharding import Mesh

from mtd_jax.config import ModelConfig, RopeConfig
from mtd_jax.convert.assemble import Piece, assemble, check_tensors, plan, stored_dtype
from mtd_jax.convert.families import FAMILIES, Family, gguf_tensors
from mtd_jax.convert.gguf_header import check_header
from mtd_jax.convert.gguf_tokenizer import read_tokenizer as tokenizer_of
from mtd_jax.convert.tensor_source import FLOATS, Index
from mtd_jax.errors import InputError, unknown_name
from mtd_jax.tokenizer import Tokenizer
from mtd_jax.transformer.model import Parameters

_ROPE_FACTORS = "rope_freqs.weight"
_ROPE_KINDS = {"none": "default", "linear": "linear", "yarn": "yarn"}
# What changes a model's arithmetic and is not read, and the values at which it changes nothing.
_REFUSED: dict[str, tuple[float, ...]] = {
    "attention.clamp_kqv": (0,),
    "attention.max_alibi_bias": (0,),
    "attention.scale": (0,),
    "attn_logit_softcapping": (0,),
    "embedding_scale": (0, 1),
    "final_logit_softcapping": (0,),
    "logit_scale": (0, 1),
    "residual_scale": (0, 1),
    "rope.scale_linear": (0, 1),
    "rope.scaling.attn_factor": (0, 1),
    "rope.scaling.yarn_attn_factor": (1,),
    "rope.scaling.yarn_ext_factor": (-1, 1),
    "rope.scaling.yarn_log_multiplier": (0,),
}


class GGUFFile:
    """A GGUF file; its tensors are dequantised when they are read (a `TensorSource`)."""

    def __init__(self, path: Path, metadata: Mapping[str, Any], tensors: Mapping[str, Any]) -> None:
        self.path = path
        self.metadata = metadata
        self._tensors = tensors

    @property
    def source(self) -> str:
        """Name, licence and quantisation of the weights, in words."""
        common = self.common_type
        name = self.metadata.get("general.name", self.path.stem)
        licence = self.metadata.get("general.license")
        text = f"GGUF {self.path.name} ({name})"
        if common not in ("F32", "F16", "BF16"):
            text += f"; weights dequantised from {common}"
        return text + (f"; licence {licence}" if licence else "")

    @property
    def common_type(self) -> str:
        """What most of the large tensors are stored as, `Q4_1`."""
        kinds = [t.tensor_type.name for t in self._tensors.values() if t.n_elements > 2**16]
        return max(sorted(set(kinds)), key=kinds.count) if kinds else "F32"

    def names(self) -> Iterable[str]:
        """All tensors there are."""
        return self._tensors.keys()

    def problems(self) -> Mapping[str, Sequence[str]]:
        """None: the gguf library refuses a file whose header gives a tensor twice."""
        return {}

    def shape(self, name: str) -> tuple[int, ...]:
        """Its sizes, outermost axis first (the file has them innermost first)."""
        return tuple(int(size) for size in reversed(self._tensors[name].shape))

    def dtype(self, name: str) -> np.dtype:
        """What `read` returns: stored 16-bit floats stay such only if nothing is quantised.

        Raises:
          InputError: a type that the gguf library cannot dequantise.
        """
        from gguf import GGMLQuantizationType

        kind = self._tensors[name].tensor_type
        if not _is_readable(kind):
            raise InputError(
                f"{self.path.name}: tensor '{name[:200]}' is stored as {kind.name}, "
                "which the gguf library cannot dequantise"
            )
        kinds = {GGMLQuantizationType.F16: "float16", GGMLQuantizationType.BF16: "bfloat16"}
        return FLOATS[kinds.get(kind, "float32")]

    def read(self, name: str, index: Index) -> np.ndarray:
        """A part of a tensor as floats.

        Raises:
          InputError: a type that the gguf library cannot dequantise, or the file has shrunk.
        """
        from gguf import quants

        tensor, dtype = self._tensors[name], self.dtype(name)
        # Mapped anew each time: pages that were read count as this process's as long as they are.
        try:
            stored = np.memmap(
                self.path,
                dtype=tensor.data.dtype,
                mode="r",
                offset=tensor.data_offset,
                shape=tensor.data.shape,
            )
        except (OSError, ValueError) as error:
            raise InputError(f"{self.path.name}: cannot read '{name[:200]}': {error}") from error
        # Blocks of quantised values lie along the last axis: rows are cut before, columns after.
        rows = np.asarray(stored) if len(index) == 1 else np.asarray(stored)[index[0]]
        with np.errstate(all="ignore"):  # what is not finite is refused by name
            values = quants.dequantize(rows, tensor.tensor_type)
        rest = index if len(index) == 1 else (slice(None), *index[1:])
        return values[rest].astype(dtype, copy=False)

    def place(self, name: str) -> str:
        """The file, for error messages."""
        return self.path.name


@functools.cache
def _is_readable(kind: Any) -> bool:
    """Whether the gguf library dequantises a type; found out with one block of zeros."""
    from gguf import GGML_QUANT_SIZES, quants

    _, size = GGML_QUANT_SIZES[kind]
    try:
        quants.dequantize(np.zeros((1, size), np.uint8), kind)
    except NotImplementedError:
        return False
    return True


def open_gguf(path: Path) -> GGUFFile:
    """Opens a file; tensors are mapped, not read.

    Raises:
      InputError: not a GGUF file, truncated or malformed.
    """
    check_header(path)
    from gguf import GGUFReader

    try:
        reader = GGUFReader(path)
        metadata = {key: field.contents() for key, field in reader.fields.items()}
    except Exception as error:  # the reader raises almost every type on malformed files
        raise InputError(f"{path.name} is damaged: {str(error)[:150]}") from error
    return GGUFFile(path, metadata, {t.name: t for t in reader.tensors})


def read_config(file: GGUFFile) -> ModelConfig:
    """The model that the metadata describe.

    Raises:
      InputError: an architecture that is not known, a feature that is not there, or values that
        make no model.
    """
    values = file.metadata
    name, family = _family_of(values)
    arch = family.gguf

    def get(key: str, default: Any = None) -> Any:
        value = values.get(f"{arch}.{key}", default)
        if value is None:
            raise InputError(f"{file.path.name} lacks the key '{arch}.{key}'")
        return value

    _refuse_unread(file, str(arch))
    heads, hidden = get("attention.head_count"), get("embedding_length")
    if not isinstance(heads, int) or not isinstance(hidden, int) or heads < 1:
        raise InputError(f"{file.path.name}: head count or embedding length is no number")
    head_dim = get("attention.key_length", hidden // heads)
    if not isinstance(head_dim, int) or head_dim < 1:
        raise InputError(f"{file.path.name}: the width of a head is no number")
    if get("rope.dimension_count", head_dim) != head_dim:
        raise InputError(f"{file.path.name}: rotary embedding of a part of each head")
    if get("attention.value_length", head_dim) != head_dim:
        raise InputError(f"{file.path.name}: values and keys differ in width")
    names = set(file.names())
    tokens = values.get("tokenizer.ggml.tokens")
    vocabulary = file.shape("token_embd.weight")[0] if "token_embd.weight" in names else None
    ends = [values.get(f"tokenizer.ggml.{key}_token_id") for key in ("eos", "eot")]
    eos = [token for token in ends if token is not None]
    return ModelConfig(
        family=name,
        vocab_size=vocabulary or get("vocab_size", len(tokens) if isinstance(tokens, list) else 0),
        hidden_size=hidden,
        intermediate_size=get("feed_forward_length"),
        num_layers=get("block_count"),
        num_heads=heads,
        num_kv_heads=get("attention.head_count_kv", heads),
        head_dim=head_dim,
        max_position=get("context_length"),
        norm_eps=_shortest(get("attention.layer_norm_rms_epsilon")),
        tie_embeddings="output.weight" not in names,
        qkv_bias="blk.0.attn_q.bias" in names,
        attention_out_bias="blk.0.attn_output.bias" in names,
        mlp_bias="blk.0.ffn_gate.bias" in names,
        qk_norm=family.qk_norm,
        rope=_rope(file, get, head_dim),
        bos_token_id=values.get("tokenizer.ggml.bos_token_id"),
        eos_token_ids=tuple(token for n, token in enumerate(eos) if token not in eos[:n]),
        pad_token_id=values.get("tokenizer.ggml.padding_token_id"),
    )


def read_parameters(
    file: GGUFFile, dtype: np.dtype | None = None, mesh: Mesh | None = None
) -> Parameters:
    """The parameters, dequantised to `dtype`; None: the 16-bit type of all matrices, or float32.

    Raises:
      InputError: missing, extra or wrongly shaped tensors (all are named), NaN, or values too
        large for `dtype`.
    """
    config = read_config(file)
    leaves = planned(config, file)
    if dtype is None:  # writers keep norms in float32, whatever the matrices are
        dtype = stored_dtype(config, file, leaves, matrices_only=True)
    return assemble(config, file, leaves, dtype, mesh)


def planned(config: ModelConfig, file: GGUFFile) -> Mapping[str, tuple[Piece, ...]]:
    """For the path of every leaf of the model, the tensors that fill it, found to be there.

    Raises:
      InputError: missing, extra or wrongly shaped tensors (all are named).
    """
    leaves = plan(config, gguf_tensors(FAMILIES[config.family]))
    check_tensors(config, file, leaves, lambda name: name == _ROPE_FACTORS)
    return leaves


def read_tokenizer(file: GGUFFile) -> Tokenizer | None:
    """The tokenizer in the metadata; see `gguf_tokenizer.read_tokenizer`."""
    return tokenizer_of(file.metadata)


def _family_of(values: Mapping[str, Any]) -> tuple[str, Family]:
    known = {family.gguf: name for name, family in FAMILIES.items() if family.gguf}
    arch = str(values.get("general.architecture"))
    if arch not in known:
        raise unknown_name("GGUF architecture", arch[:60], known)
    return known[arch], FAMILIES[known[arch]]


def _refuse_unread(file: GGUFFile, arch: str) -> None:
    values = file.metadata
    for key, harmless in _REFUSED.items():
        if (value := values.get(f"{arch}.{key}", harmless[0])) not in harmless:
            raise InputError(f"{file.path.name}: {arch}.{key} = {str(value)[:60]} is not supported")
    window = values.get(f"{arch}.attention.sliding_window")
    context = values.get(f"{arch}.context_length")
    is_harmless = isinstance(window, int) and isinstance(context, int) and window >= context
    if window and not is_harmless:
        raise InputError(f"{file.path.name}: sliding windows of GGUF files are not supported")


def _rope(file: GGUFFile, get: Any, head_dim: int) -> RopeConfig:
    theta = _shortest(get("rope.freq_base", 10_000.0))
    if _ROPE_FACTORS in file.names():
        return _llama3_rope(file, theta, head_dim)
    kind = get("rope.scaling.type", "none")
    if not isinstance(kind, str) or kind not in _ROPE_KINDS:
        raise unknown_name("GGUF rope scaling", str(kind)[:60], _ROPE_KINDS)
    if kind == "none":
        return RopeConfig(theta=theta)
    factor = _shortest(get("rope.scaling.factor", 1.0))
    original = get("rope.scaling.original_context_length", get("context_length"))
    return RopeConfig(
        kind="yarn" if kind == "yarn" else "linear",
        theta=theta,
        factor=factor,
        original_max_position=original if kind == "yarn" else None,
        beta_fast=_shortest(get("rope.scaling.yarn_beta_fast", 32.0)),
        beta_slow=_shortest(get("rope.scaling.yarn_beta_slow", 1.0)),
    )


def _llama3_rope(file: GGUFFile, theta: float, head_dim: int) -> RopeConfig:
    """Finds the parameters of Llama 3.1's scaling whose factors the file holds instead of them.

    Its low and high frequency factors are 1 and 4 and the original context 8192 in all releases;
    `factor` is the largest value. What this gives is compared with what the file holds.
    """
    from mtd_jax.transformer.rope import inverse_frequencies

    if head_dim < 2 or file.shape(_ROPE_FACTORS) != (head_dim // 2,):
        raise InputError(f"{file.path.name}: '{_ROPE_FACTORS}' must be [{head_dim // 2}]")
    stored = file.read(_ROPE_FACTORS, (slice(0, head_dim // 2),)).astype(np.float32)
    if not np.isfinite(stored).all() or stored.min() < 1:
        raise InputError(f"{file.path.name}: '{_ROPE_FACTORS}' holds no valid factors")
    if np.all(stored == 1):
        return RopeConfig(theta=theta)
    rope = RopeConfig(
        kind="llama3",
        theta=theta,
        factor=_shortest(stored.max()),
        original_max_position=8192,
        low_freq_factor=1.0,
        high_freq_factor=4.0,
    )
    plain = inverse_frequencies(dataclasses.replace(rope, kind="default"), head_dim)
    expected = plain / inverse_frequencies(rope, head_dim)
    if not np.allclose(stored, expected, rtol=1e-3):
        raise InputError(f"{file.path.name}: '{_ROPE_FACTORS}' are not those of Llama 3")
    return rope


def _shortest(value: Any) -> float:
    """A float32 from the file as the decimal number it was made from: 1e-05, not 9.99999975e-06."""
    if not isinstance(value, int | float | np.floating):
        raise InputError(f"a number was expected in the GGUF metadata, not {type(value).__name__}")
    with np.errstate(over="ignore"):  # infinity is refused by name
        return float(str(np.float32(value)))
