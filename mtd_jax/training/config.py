"""What a training run is: one TOML file, read into frozen dataclasses and checked.

    model = "models/smollm2-135m-instruct"
    out = "runs/sft"

    [data]
    train = ["corpus/train.jsonl"]
    length = 1024

    [optimizer]
    steps = 300

Every key has its docstring below; an unknown one is an error that names the nearest.
"""

from __future__ import annotations

import dataclasses
import tomllib
import types
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, TypeVar

from mtd_jax.errors import InputError, first_line, unknown_name

Config = TypeVar("Config")


_LARGEST = 3e38
"""About the largest float32."""
_GREATEST_RATE = 1e3
_LEAST_EPSILON = 1e-20


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """[data]: which texts, and how they become rows."""

    train: tuple[str, ...] = ()
    """Files (.jsonl, .txt), directories of such, or Hugging Face `datasets` directories."""
    held_out: tuple[str, ...] = ()
    """The same for evaluation."""
    held_out_fraction: float = 0.0
    """Share of the training documents put aside for evaluation where `held_out` is empty."""
    length: int = 1024
    """Tokens of a row."""
    batch_size: int = 8
    """Rows of a step, over all devices."""
    accumulate: int = 1
    """A step's rows are run in so many parts, one after another, to save memory."""
    loss: Literal["assistant", "all"] = "assistant"
    """Tokens of a conversation that are learned; of plain text it is always all."""
    packing: bool = True
    """Several documents share a row (first fit); otherwise a document has a row of its own."""
    overlong: Literal["split", "drop"] = "split"
    """A document longer than a row is cut into several, or left out."""
    cache: str = ""
    """Directory of tokenised texts; empty: `tokens` in mtd's cache directory."""


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """[optimizer]: AdamW (arXiv 1711.05101) and its schedule."""

    steps: int = 1000
    learning_rate: float = 1e-5
    """At the end of the warm-up."""
    schedule: Literal["cosine", "linear", "wsd", "constant"] = "cosine"
    """`wsd`: warm up, stay, decay over the last `decay` of the steps (arXiv 2404.06395)."""
    warmup: float = 0.1
    """Share of the steps."""
    decay: float = 0.2
    """Share of the steps, for `wsd`."""
    final: float = 0.1
    """What the learning rate falls to, as a share of the peak: it would be that of the step behind
    the last."""
    beta1: float = 0.9
    beta2: float = 0.95
    epsilon: float = 1e-8
    weight_decay: float = 0.0
    """On matrices; norms and biases are left alone."""
    clip: float = 1.0
    """Largest norm of a gradient; 0 does not clip."""


@dataclasses.dataclass(frozen=True)
class MemoryConfig:
    """[memory]: what is stored, and in how many bits."""

    compute: Literal["auto", "bfloat16", "float32"] = "auto"
    """Activations and the weights they meet; `auto` is float32 on CPU, bfloat16 elsewhere.
    Trained weights and the optimiser's state are float32 always."""
    remat: Literal["none", "layer", "dots"] = "layer"
    """Kept for the backward pass: everything; each layer's input; that and matrix products."""
    loss_chunk: int = 1024
    """Positions whose logits exist at a time."""


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    """[mesh]: devices along each axis; `data = 0` takes all that the others leave.

    With `data` given, one process may use fewer devices than it has; several must use all.
    """

    slices: int = 1
    """TPU slices (or islands of GPUs) joined by the slower network; splits the batch."""
    data: int = 0
    fsdp: int = 1
    tensor: int = 1


@dataclasses.dataclass(frozen=True)
class CheckpointConfig:
    """[checkpoint]: when to save, what to keep."""

    every: int = 100
    """Steps."""
    keep_last: int = 2
    keep_best: int = 1
    """By held-out loss: of the steps that are both evaluated and saved."""


@dataclasses.dataclass(frozen=True)
class EvaluateConfig:
    """[evaluate]: when and on what to measure."""

    every: int = 100
    """Steps; 0 never evaluates."""
    batches: int = 16
    """Held-out batches at most."""
    prompts: str = ""
    """Prompts file to decode from at every evaluation: acceptance, or agreement with the base."""
    prompt_limit: int = 8
    new_tokens: int = 64


@dataclasses.dataclass(frozen=True)
class LogConfig:
    """[log]: what a run tells while it goes on."""

    every: int = 10
    """Steps between looks at the device's measurements; log.jsonl has all of them."""
    tensorboard: bool = True
    """Event files too, where tensorboardX is installed."""


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """A whole run."""

    model: str
    """Native checkpoint, HF directory or GGUF file."""
    out: str
    """Directory of the run: checkpoints, logs, the trained model."""
    method: str = "sft"
    """What is trained: `sft` (the model itself) or a decoding method."""
    options: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    """[options]: the method's own."""
    freeze: tuple[str, ...] = ()
    """Weights of the model left as they are, by the beginning of their path: `embedding`."""
    seed: int = 0
    data: DataConfig = DataConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    memory: MemoryConfig = MemoryConfig()
    mesh: MeshConfig = MeshConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    evaluate: EvaluateConfig = EvaluateConfig()
    log: LogConfig = LogConfig()


def read_config(path: str | Path, changes: Sequence[str] = ()) -> TrainConfig:
    """The run that a TOML file describes, with `key=value` changes (`optimizer.steps=10`) over it.

    Raises:
      InputError: no such file, not TOML, an unknown key, a value of the wrong kind or out of range.
    """
    path = Path(path)
    try:
        values = tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(f"no config at {path}") from None
    except tomllib.TOMLDecodeError as error:
        raise InputError(f"{path} is not TOML: {error}") from None
    # Bytes that are no text and a number of over 4300 digits are ValueErrors.
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"cannot read {path}: {first_line(error)}") from None
    for change in changes:
        _apply(values, change)
    return parse_config(values)


def parse_config(values: Mapping[str, Any]) -> TrainConfig:
    """The run that a mapping describes.

    Raises:
      InputError: as for `read_config`.
    """
    _check_numbers(values)
    config = _parse(TrainConfig, values, "")
    _check(config)
    return config


def to_dict(config: TrainConfig) -> dict[str, Any]:
    """What `parse_config` reads."""
    return dataclasses.asdict(config)


def _apply(values: dict[str, Any], change: str) -> None:
    """Sets a key like `optimizer.steps=10`; the value is TOML, or else text."""
    key, equals, text = change.partition("=")
    if not equals or not key.strip():
        raise InputError(f"--set takes key=value, got '{change[:80]}'")
    try:
        value = tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        value = text
    except (ValueError, RecursionError) as error:
        raise InputError(f"--set {key}: {first_line(error)}") from None
    *tables, last = key.strip().split(".")
    for name in tables:
        values = values.setdefault(name, {})
        if not isinstance(values, dict):
            raise InputError(f"--set {key}: '{name}' is no table")
    values[last] = value


def _check_numbers(value: Any, key: str = "") -> None:
    """Whole numbers of TOML have 64 bits; Python reads longer ones, which no message could show."""
    if isinstance(value, int) and abs(value) >= 2**63:
        raise InputError(f"{key} must be a 64-bit number")
    if isinstance(value, Mapping):
        for name, inner in value.items():
            _check_numbers(inner, f"{key}.{name}" if key else str(name))
    elif isinstance(value, list | tuple):
        for inner in value:
            _check_numbers(inner, key)


def _parse(kind: type[Config], values: Any, where: str) -> Config:
    if not isinstance(values, Mapping):
        raise InputError(f"'{where.rstrip('.')}' must be a table of keys, got {values!r}")
    assert dataclasses.is_dataclass(kind)
    hints = typing.get_type_hints(kind)
    found: dict[str, Any] = {}
    for key, value in values.items():
        if key not in hints:
            raise unknown_name("config key", f"{where}{key}", [f"{where}{name}" for name in hints])
        found[key] = _typed(hints[key], value, f"{where}{key}")
    for field in dataclasses.fields(kind):
        required = field.default is dataclasses.MISSING
        if required and field.default_factory is dataclasses.MISSING and field.name not in found:
            raise InputError(f"the config needs '{where}{field.name}'")
    return kind(**found)


def _typed(kind: Any, value: Any, key: str) -> Any:
    origin = typing.get_origin(kind)
    if dataclasses.is_dataclass(kind):
        assert isinstance(kind, type)
        return _parse(kind, value, f"{key}.")
    if origin is Literal:
        choices = typing.get_args(kind)
        if value not in choices:
            raise InputError(f"{key} must be one of {', '.join(choices)}; got {value!r}")
        return value
    if origin is tuple:
        if not isinstance(value, list | tuple) or not all(isinstance(x, str) for x in value):
            raise InputError(f"{key} must be a list of texts, got {value!r}")
        return tuple(value)
    if origin is not None or isinstance(kind, types.UnionType):
        if not isinstance(value, Mapping):
            raise InputError(f"{key} must be a table of keys, got {value!r}")
        return dict(value)
    wanted = (int, float) if kind is float else kind
    if not isinstance(value, wanted) or (isinstance(value, bool) and kind is not bool):
        raise InputError(f"{key} must be {kind.__name__}, got {value!r}")
    return float(value) if kind is float else value


def _check(config: TrainConfig) -> None:
    """Ranges; what depends on the model or the devices is checked where they are known."""
    at_least = {
        0: ("seed", "mesh.data", "checkpoint.keep_best", "evaluate.every", "optimizer.final"),
        1: (
            "data.length data.batch_size data.accumulate optimizer.steps memory.loss_chunk "
            "mesh.fsdp mesh.tensor mesh.slices checkpoint.every checkpoint.keep_last "
            "evaluate.batches evaluate.prompt_limit evaluate.new_tokens log.every"
        ).split(),
    }
    for least, keys in at_least.items():
        for key in keys:
            if _value(config, key) < least:
                raise InputError(f"{key} must be at least {least}, got {_value(config, key)}")
    at_most = {2**20: ("data.batch_size", "data.length"), 2**31 - 1: ("optimizer.steps",)}
    for most, keys in at_most.items():
        for key in keys:
            if _value(config, key) > most:
                raise InputError(f"{key} must be at most {most}, got {_value(config, key)}")
    for key in ("out", "data.cache", "evaluate.prompts"):
        if "\0" in (_value(config, key) or ""):
            raise InputError(f"{key} holds a zero byte")
    if not config.out.strip():
        raise InputError("out names no directory")
    for key in ("warmup", "decay", "final", "beta1", "beta2"):
        value = _value(config, f"optimizer.{key}")
        if not 0 <= value <= 1 or (key.startswith("beta") and value == 1):
            raise InputError(f"optimizer.{key} must be between 0 and 1, got {value}")
    for key in ("learning_rate", "epsilon", "weight_decay", "clip"):
        value = _value(config, f"optimizer.{key}")
        if not 0 <= value <= _LARGEST:
            raise InputError(
                f"optimizer.{key} must be a number between 0 and {_LARGEST:g}, got {value}"
            )
    # With these no update of AdamW overflows whose gradient did not.
    for key in ("learning_rate", "weight_decay"):
        value = _value(config, f"optimizer.{key}")
        if value > _GREATEST_RATE:
            raise InputError(f"optimizer.{key} must be at most {_GREATEST_RATE:g}, got {value:g}")
    if config.optimizer.epsilon < _LEAST_EPSILON:
        raise InputError(
            f"optimizer.epsilon must be at least {_LEAST_EPSILON:g}, got {config.optimizer.epsilon}"
        )
    if config.seed >= 2**32:
        raise InputError(f"seed must be less than 2^32, got {config.seed}")
    if not 0 <= config.data.held_out_fraction < 1:
        raise InputError("data.held_out_fraction must be at least 0 and less than 1")
    if config.data.length < 2:
        raise InputError("data.length must be at least 2: a token and the one it predicts")
    if config.data.batch_size % config.data.accumulate:
        raise InputError(
            f"data.accumulate = {config.data.accumulate} does not divide data.batch_size = "
            f"{config.data.batch_size}"
        )
    if not config.data.train:
        raise InputError("data.train names no files")


def _value(config: Any, key: str) -> Any:
    for name in key.split("."):
        config = getattr(config, name)
    return config
