"""What a decoder is: every number that shapes its parameters or its arithmetic, and nothing else.

`ModelConfig` is frozen and hashable, so it can be a static part of the parameter tree; all
validation happens when one is made, so no other module needs to doubt a value.
"""

from __future__ import annotations

import dataclasses
import reprlib
import tomllib
from pathlib import Path
from typing import Any, Literal

from mtd_jax.errors import InputError, unknown_name
from mtd_jax.typing import is_number, is_whole

RopeKind = Literal["default", "linear", "dynamic", "yarn", "llama3"]
ROPE_KINDS: tuple[RopeKind, ...] = ("default", "linear", "dynamic", "yarn", "llama3")
Anchor = Literal["prompt", "sequence"]
ANCHORS: tuple[Anchor, ...] = ("prompt", "sequence")
MAX_CYCLE = 8
"""Tokens of a DMTD cycle at most."""

# Bounds against hostile or broken files: far above any model that exists, far below what would
# exhaust memory before the first tensor is looked at.
_LIMITS = {
    "vocab_size": 2**22,
    "hidden_size": 2**17,
    "intermediate_size": 2**20,
    "num_layers": 2**12,
    "num_heads": 2**12,
    "num_kv_heads": 2**12,
    "head_dim": 2**12,
    "max_position": 2**26,
}
_SWITCHES = ("tie_embeddings", "qkv_bias", "attention_out_bias", "mlp_bias", "qk_norm")


def _shown(value: Any) -> str:
    """A value from a file in a few letters, however long or deep it is."""
    # Python writes no number of over 4300 digits; TOML can hold one (hexadecimal).
    if isinstance(value, int) and abs(value) >= 2**64:
        return f"a number of {value.bit_length()} bits"
    return reprlib.repr(value)


def _require_int(name: str, value: Any, limit: int) -> None:
    if not is_whole(value):
        raise InputError(f"{name} must be a whole number, got {_shown(value)}")
    if not 1 <= value <= limit:
        raise InputError(f"{name} must be between 1 and {limit}, got {_shown(value)}")


def _number(name: str, value: Any, *, minimum: float, strict: bool = False) -> float:
    """The value as a float: a whole number would be one of 32 bits under jit."""
    # Far beyond any use, far from overflow in what is computed with it.
    if not is_number(value) or not abs(value) <= 1e12:
        raise InputError(f"{name} must be a finite number of at most 1e12, got {_shown(value)}")
    if value < minimum or (strict and value == minimum):
        raise InputError(f"{name} must be {'over' if strict else 'at least'} {minimum:g}")
    return float(value)


@dataclasses.dataclass(frozen=True)
class RopeConfig:
    """Rotary position embedding and how its frequencies are stretched for long contexts."""

    kind: RopeKind = "default"
    theta: float = 10_000.0
    factor: float = 1.0
    """By how much the context is stretched (all kinds but `default`)."""
    original_max_position: int | None = None
    """Context length before stretching (`dynamic`, `yarn`, `llama3`)."""
    low_freq_factor: float = 1.0
    """`llama3`: wavelengths over original_max_position / this are divided by `factor`."""
    high_freq_factor: float = 4.0
    """`llama3`: wavelengths under original_max_position / this stay."""
    beta_fast: float = 32.0
    """`yarn`: dimensions that turn more often than this over the original context stay."""
    beta_slow: float = 1.0
    """`yarn`: dimensions that turn less often than this are divided by `factor`."""
    attention_factor: float | None = None
    """`yarn`: scale of cos and sin; None takes the paper's 0.1 ln(factor) + 1."""
    mscale: float | None = None
    mscale_all_dim: float | None = None
    """`yarn`: with both given, the scale is the ratio of the two (DeepSeek's form)."""
    truncate: bool = True
    """`yarn`: round the bounds of the ramp to whole dimensions."""

    def __post_init__(self) -> None:
        if self.kind not in ROPE_KINDS:
            raise unknown_name("rope type", str(self.kind)[:60], ROPE_KINDS)
        positive = ["theta", "factor", "low_freq_factor", "high_freq_factor"]
        positive += ["beta_fast", "beta_slow"]
        for name in positive:
            # Lengths are divided by them, and YaRN takes the logarithm: not of infinity.
            number = _number(f"rope {name}", getattr(self, name), minimum=1e-6)
            object.__setattr__(self, name, number)
        for name in ("attention_factor", "mscale", "mscale_all_dim"):
            if getattr(self, name) is not None:
                number = _number(f"rope {name}", getattr(self, name), minimum=0.0)
                object.__setattr__(self, name, number)
        if not isinstance(self.truncate, bool):
            raise InputError(f"rope truncate must be true or false, got {_shown(self.truncate)}")
        if self.original_max_position is not None:
            _require_int("rope original_max_position", self.original_max_position, 2**26)
        elif self.kind in ("dynamic", "yarn", "llama3"):
            raise InputError(f"rope type '{self.kind}' needs original_max_position")
        if self.theta <= 1.0:
            raise InputError(f"rope theta must be over 1, got {self.theta:g}")
        if self.factor > 1e6:
            raise InputError(f"rope factor must be at most 1e6, got {self.factor:g}")
        if self.kind == "llama3" and self.high_freq_factor <= self.low_freq_factor:
            raise InputError("rope high_freq_factor must be greater than low_freq_factor")


@dataclasses.dataclass(frozen=True)
class CycleConfig:
    """The cycles that a model was trained for (DMTD, arXiv 2510.11958; docs/dmtd.md).

    Raises:
      InputError: a value outside its range.
    """

    early: int
    """E: layers whose output meets the late layers beside the middle ones'."""
    late: int
    """D: layers that run for every token."""
    cycle: int
    """Tokens of a cycle."""
    anchor: Anchor | None = None
    """Where cycles start: behind the prompt, or at the first token of the text; None: not known, as
    in checkpoints of the method's authors."""
    model_type: str | None = None
    """What a Hugging Face config called the model; None: `dmtd` and the family's name."""

    def __post_init__(self) -> None:
        for name, least, most in (("early", 0, 2**12), ("late", 1, 2**12), ("cycle", 1, MAX_CYCLE)):
            value = getattr(self, name)
            if not is_whole(value) or not least <= value <= most:
                raise InputError(f"cycles: {name} must be {least} to {most}, got {_shown(value)}")
        if self.anchor is not None and self.anchor not in ANCHORS:
            raise unknown_name("anchor", str(self.anchor)[:60], ANCHORS)
        if self.model_type is not None and not isinstance(self.model_type, str):
            raise InputError(f"cycles: model_type must be text, got {_shown(self.model_type)}")


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """One decoder-only transformer.

    Raises:
      InputError: a value is missing, absurd, or does not fit the others.
    """

    family: str
    """Name of the entry in `convert.families.FAMILIES` that reads and writes this model."""
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    max_position: int
    """HF's max_position_embeddings; see `context_length`."""
    norm_eps: float = 1e-6
    tie_embeddings: bool = False
    """The output head is the embedding, transposed."""
    qkv_bias: bool = False
    attention_out_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    """RMSNorm over each head of q and k before RoPE (Qwen3)."""
    sliding_windows: tuple[int | None, ...] | None = None
    """One entry a layer: the number of last positions it sees, itself included; None sees all.
    None in place of the tuple: every layer sees all."""
    attention_logit_softcap: float | None = None
    """c in c * tanh(scores / c), before the mask."""
    final_logit_softcap: float | None = None
    """c in c * tanh(logits / c)."""
    rope: RopeConfig = RopeConfig()
    bos_token_id: int | None = None
    eos_token_ids: tuple[int, ...] = ()
    pad_token_id: int | None = None
    cycles: CycleConfig | None = None
    """What DMTD decodes these weights with; changes nothing for other methods."""

    def __post_init__(self) -> None:
        for name, limit in _LIMITS.items():
            _require_int(name, getattr(self, name), limit)
        if not isinstance(self.family, str):
            raise InputError(f"family must be text, got {_shown(self.family)}")
        for name in _SWITCHES:
            if not isinstance(getattr(self, name), bool):
                raise InputError(f"{name} must be true or false, got {_shown(getattr(self, name))}")
        if self.num_heads % self.num_kv_heads:
            raise InputError(
                f"num_heads ({self.num_heads}) is not a multiple of "
                f"num_kv_heads ({self.num_kv_heads})"
            )
        if self.head_dim % 2:
            raise InputError(f"head_dim ({self.head_dim}) must be even for rotary embeddings")
        if self.rope.kind == "dynamic" and self.head_dim == 2:
            raise InputError("head_dim (2) must be at least 4 for rope type 'dynamic'")
        caps = ("attention_logit_softcap", "final_logit_softcap")
        for name in ("norm_eps", *(c for c in caps if getattr(self, c) is not None)):
            number = _number(name, getattr(self, name), minimum=0.0, strict=True)
            object.__setattr__(self, name, number)
        if self.sliding_windows is not None:
            if not isinstance(self.sliding_windows, tuple):
                raise InputError(
                    f"sliding_windows must be a list, got {_shown(self.sliding_windows)}"
                )
            if len(self.sliding_windows) != self.num_layers:
                raise InputError(
                    f"sliding_windows has {len(self.sliding_windows)} entries "
                    f"for {self.num_layers} layers"
                )
            for window in self.sliding_windows:
                if window is not None:
                    _require_int("sliding window", window, 2**26)
        if self.cycles is not None and self.cycles.early + self.cycles.late >= self.num_layers:
            raise InputError(
                f"{self.cycles.early} early and {self.cycles.late} late layers leave no middle one "
                f"of {self.num_layers}"
            )
        if not isinstance(self.eos_token_ids, tuple):
            raise InputError(f"eos_token_ids must be a list, got {_shown(self.eos_token_ids)}")
        for token in (self.bos_token_id, self.pad_token_id, *self.eos_token_ids):
            if token is not None and not (is_whole(token) and 0 <= token < self.vocab_size):
                raise InputError(
                    f"special token id {_shown(token)} is outside 0..{self.vocab_size - 1}"
                )

    @property
    def group_size(self) -> int:
        """G: query heads that share one key/value head."""
        return self.num_heads // self.num_kv_heads

    @property
    def context_length(self) -> int:
        """The most tokens, prompt and answer together, that the model can be used with.

        Stretched by the factor where the config states the length before stretching, as for
        Vicuna-16k (linear); llama3 and most YaRN configs state the one after it.
        """
        rope = self.rope
        if rope.kind in ("linear", "dynamic"):
            return int(self.max_position * rope.factor)
        if rope.kind == "yarn" and rope.original_max_position is not None:
            return max(self.max_position, int(rope.original_max_position * rope.factor))
        return self.max_position

    def to_dict(self) -> dict[str, Any]:
        """The config as JSON-ready values; `from_dict` is its inverse."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> ModelConfig:
        """A config from what `to_dict` wrote.

        Raises:
          InputError: an unknown key (the nearest known one is named) or a bad value.
        """
        values = dict(values)
        rope, cycles = values.pop("rope", {}), values.pop("cycles", None)
        if not isinstance(rope, dict):
            raise InputError("config key 'rope' must be an object")
        if cycles is not None:
            if not isinstance(cycles, dict):
                raise InputError("config key 'cycles' must be an object")
            values["cycles"] = _from_fields(CycleConfig, cycles)
        for name in ("sliding_windows", "eos_token_ids"):
            if isinstance(values.get(name), list):
                values[name] = tuple(values[name])
        return _from_fields(cls, {**values, "rope": _from_fields(RopeConfig, rope)})


def _from_fields(cls: type, values: dict[str, Any]) -> Any:
    fields = {f.name: f for f in dataclasses.fields(cls)}
    for key in values:
        if key not in fields:
            raise unknown_name("config key", key, fields)
    required = [n for n, f in fields.items() if f.default is dataclasses.MISSING]
    missing = [n for n in required if n not in values]
    if missing:
        raise InputError(f"config lacks {', '.join(missing)}")
    return cls(**values)


def read_shape(path: str | Path) -> ModelConfig:
    """The model that a shape file (configs/models/*.toml) describes: no weights, no tokenizer.

    Raises:
      InputError: no such file, not TOML, or no model.
    """
    path = Path(path)
    try:
        values = tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(f"no shape of a model at {path}") from None
    # Bytes that are no text, text that is no TOML, and a number of too many digits are ValueErrors.
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"cannot read {path}: {error}") from None
    return ModelConfig.from_dict(values)
