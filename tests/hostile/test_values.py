"""Odd values in otherwise good configs and metadata: refused by name, or a model to be used."""

import dataclasses
import json
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import jaxtyping
import numpy as np
import pytest

import mtd_jax as mtd
from mtd_jax.cli.main import main
from mtd_jax.config import ROPE_KINDS, ModelConfig, RopeConfig, read_shape
from mtd_jax.convert.gguf import GGUFFile, open_gguf, read_config, read_tokenizer
from mtd_jax.convert.hf_config import config_from_hf
from mtd_jax.errors import InputError
from mtd_jax.transformer.rope import attention_scale, inverse_frequencies, rotary
from tests.support import tiny
from tests.support.checkpoints import hf_config, hf_tensors
from tests.support.command_line import one_line
from tests.support.gguf_files import write_gguf
from tests.support.tokenizers import byte_level

NUMBERS: list[Any] = [-(10**400), -1, 0, 1, 2, 3, 2**33, 10**11, 10**400]
NUMBERS += [5e-324, 0.5, 4.0, 1e12, 1e308, float("inf"), float("nan")]
GGUF_VALUES: list[Any] = [n for n in NUMBERS if isinstance(n, float) or abs(n) < 2**63]
GGUF_VALUES += [True, "", "none", [1, 2], ["a"]]
VALUES: list[Any] = [*NUMBERS, *GGUF_VALUES[-5:], None, [], [[1]], {}, {"a": []}]
KINDS = [kind for kind in ROPE_KINDS if kind != "default"]
ROPE_KEYS = [field.name for field in dataclasses.fields(RopeConfig) if field.name != "kind"]
HF_ROPE = {"original_max_position": "original_max_position_embeddings", "theta": "rope_theta"}


@pytest.fixture(autouse=True)
def _without_type_checks() -> Iterator[None]:
    """As a user runs it; the checks of the tests would refuse odd types before the code does."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


def use(config: ModelConfig) -> None:
    """What loading and decoding do with a config before they look at a weight."""
    assert hash(config) == hash(dataclasses.replace(config))
    assert config.context_length >= 0
    if config.rope.kind == "dynamic":
        rotary(config, jnp.zeros((1, 1), jnp.int32), jnp.ones((1, 1), jnp.int32))
    elif config.head_dim <= 64:
        inverse_frequencies(config.rope, config.head_dim)
    assert np.isfinite(attention_scale(config.rope))


def refused(make: Callable[..., Any], *given: Any) -> bool:
    """Whether it raises what the command line prints in one line; any other error passes on."""
    try:
        made = make(*given)
    except InputError:
        return True
    if isinstance(made, ModelConfig):
        use(made)
    return False


def with_each(
    base: Mapping[str, Any], keys: list[str], odd: list[Any] = VALUES
) -> Iterator[dict[str, Any]]:
    return ({**base, key: value} for key in keys for value in odd)


def test_every_key_of_a_hugging_face_config() -> None:
    base = hf_config("qwen3", use_sliding_window=True, sliding_window=4, max_window_layers=1)
    cycles = ["num_encoding_layers", "num_thinking_layers", "num_decoding_layers", "mtp_horizon"]
    keys = [*base, *cycles, "layer_types", "rope_scaling", "rope_parameters", "pad_token_id"]
    keys += ["attention_bias", "hidden_act", "partial_rotary_factor"]
    found = [refused(config_from_hf, values) for values in with_each(base, keys)]
    assert 0.5 < np.mean(found) < 0.95
    for generation in with_each({}, ["bos_token_id", "eos_token_id", "pad_token_id"]):
        refused(config_from_hf, base, generation)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("given", [{"factor": 4.0}, {}])
def test_every_key_of_a_rope(kind: str, given: dict[str, Any]) -> None:
    """With head dimensions of 8 and of 2: dynamic NTK divides by two less."""
    good: dict[str, Any] = {"rope_type": kind, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    keys = [HF_ROPE.get(key, key) for key in ROPE_KEYS]
    for rope in [good | given, *with_each(good | given, keys)]:
        others: list[dict[str, Any]] = [{}, {"head_dim": 2}, {"max_position_embeddings": 10**400}]
        for changes in others:
            refused(config_from_hf, hf_config(rope_scaling=rope, **changes))


def test_every_key_of_a_native_config() -> None:
    cycles = {"num_decoding_layers": 1, "num_thinking_layers": 3, "mtp_horizon": 2}
    windows = {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 2}
    base = config_from_hf(hf_config("qwen3", num_hidden_layers=4, **cycles, **windows)).to_dict()
    assert not refused(ModelConfig.from_dict, base)
    assert base["cycles"] is not None
    found = [refused(ModelConfig.from_dict, v) for v in with_each(base, list(base))]
    assert 0.5 < np.mean(found) < 0.95
    for part in ("rope", "cycles"):
        for values in with_each(base[part], list(base[part])):
            refused(ModelConfig.from_dict, base | {part: values})
    for kind in KINDS:
        rope = base["rope"] | {"kind": kind, "original_max_position": 64, "factor": 2}
        for values in with_each(rope, list(rope)):
            refused(ModelConfig.from_dict, base | {"rope": values})


def test_head_dimensions_of_two() -> None:
    dynamic = {"rope_type": "dynamic", "factor": 2.0}
    with pytest.raises(InputError, match=r"head_dim \(2\) must be at least 4"):
        config_from_hf(hf_config(head_dim=2, rope_scaling=dynamic))
    use(config_from_hf(hf_config(head_dim=4, rope_scaling=dynamic)))


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("vocab_size = " + "9" * 5000, "cannot read"),
        ("vocab_size = 0x" + "f" * 5000, "a number of 20000 bits"),
        ("vocab_size = " + "[" * 5000 + "]" * 5000, "cannot read"),
        ("sliding_windows = 3", "sliding_windows must be a list"),
        ("\0", "cannot read"),
    ],
    ids=["digits", "hexadecimal", "deep", "windows", "zero byte"],
)
def test_shapes_of_models(tmp_path: Path, text: str, said: str) -> None:
    sizes = ("hidden_size", "intermediate_size", "num_layers", "num_heads", "num_kv_heads")
    good = [f"{name} = 4" for name in (*sizes, "head_dim", "max_position", "vocab_size")]
    kept = [line for line in good if line.split()[0] != text.split()[0]]
    path = tmp_path / "shape.toml"
    path.write_text("\n".join([text, 'family = "llama"', *kept]))
    with pytest.raises(InputError, match=said):
        read_shape(path)


@pytest.fixture(scope="module")
def gguf(tmp_path_factory: pytest.TempPathFactory) -> GGUFFile:
    config = hf_config(num_hidden_layers=1, vocab_size=4)
    tokens = {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": ["<unk>", "<s>", "</s>", "▁a"],
        "tokenizer.ggml.scores": [0.0, 0.0, 0.0, -1.0],
        "tokenizer.ggml.token_type": [2, 3, 3, 1],
    }
    path = tmp_path_factory.mktemp("gguf") / "m.gguf"
    factors = {"rope_freqs.weight": np.ones(config["head_dim"] // 2, np.float32)}
    return open_gguf(
        write_gguf(path, config, hf_tensors(config), extra=tokens, extra_tensors=factors)
    )


def test_every_key_of_a_gguf_file(gguf: GGUFFile) -> None:
    keys = [*gguf.metadata, "llama.rope.scaling.type", "llama.rope.scaling.factor"]
    keys += ["llama.rope.scaling.original_context_length", "llama.rope.dimension_count"]
    keys += [f"tokenizer.ggml.{name}" for name in ("eot_token_id", "padding_token_id", "pre")]
    keys += ["tokenizer.chat_template", "tokenizer.ggml.add_bos_token", "llama.vocab_size"]
    assert not refused(read_config, gguf)
    assert not refused(read_tokenizer, gguf)
    # With the factors of Llama 3, with the keys that say another stretching, and without weights.
    plain = {name: t for name, t in gguf._tensors.items() if name != "rope_freqs.weight"}
    stretched = {"llama.rope.scaling.type": "yarn", "llama.rope.scaling.factor": 2.0}
    yarn = {**gguf.metadata, **stretched}
    kinds = [(gguf.metadata, gguf._tensors), (gguf.metadata, plain), (yarn, plain), (yarn, {})]
    for metadata, tensors in kinds:
        for values in with_each(metadata, keys, GGUF_VALUES):
            refused(read_config, GGUFFile(gguf.path, values, tensors))
    words = [key for key in keys if key.startswith("tokenizer.")]
    for values in with_each(gguf.metadata, words, GGUF_VALUES):
        refused(read_tokenizer, GGUFFile(gguf.path, values, {}))


@pytest.mark.parametrize("bos", ["<s> x", "$A", "a:b", ""])
def test_a_beginning_that_is_no_word(gguf: GGUFFile, bos: str) -> None:
    tokens = ["<unk>", bos, "</s>", "▁a"]
    changed = GGUFFile(gguf.path, {**gguf.metadata, "tokenizer.ggml.tokens": tokens}, {})
    refused(read_tokenizer, changed)


def test_an_end_token_that_is_a_list(
    gguf: GGUFFile, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = hf_config(num_hidden_layers=1)
    for number, ends in enumerate([[1, 2], ["a"]]):
        path = tmp_path / f"{number}.gguf"
        write_gguf(path, config, hf_tensors(config), extra={"tokenizer.ggml.eos_token_id": ends})
        capsys.readouterr()
        assert main(["inspect", str(path)]) == 2
        assert "special token id [" in one_line(capsys)


@pytest.mark.parametrize(
    ("prompts", "options", "said"),
    [
        (5, {}, "not int"),
        ([None], {}, "prompt 0 is neither"),
        ([1, "a"], {}, "prompt 0 is neither"),
        ([[1, "a"]], {}, "'a' is not a whole number"),
        ([[1.0]], {}, "1.0 is not a whole number"),
        ([[1]], {"stop": None}, "stop strings must be text"),
        ([[1]], {"stop": [3]}, "stop strings must be text"),
        ([[1]], {"stop": [""]}, "stop strings must be text"),
        ([[1]], {"batch_size": "1"}, "batch_size"),
        ([[1]], {"batch_size": 10**9}, "batch_size must be from 1 to 65536"),
        ([[1]], {"max_new_tokens": 1.5}, "max_new_tokens"),
    ],
)
def test_requests_from_python(prompts: Any, options: dict[str, Any], said: str) -> None:
    model = dataclasses.replace(tiny.language_model(tiny.config()), tokenizer=byte_level())
    with pytest.raises(InputError, match=re.escape(said)):
        mtd.generate(model, mtd.methods.autoregressive(), prompts, **options)


def test_token_ids_of_numpy() -> None:
    model, method = tiny.language_model(tiny.config()), mtd.methods.autoregressive()
    plain = mtd.generate(model, method, [3, 4], max_new_tokens=2)
    prompts: list[Any] = [
        [np.int64(3), np.int64(4)],
        np.array([3, 4], np.uint8),
        [[np.int32(3), 4]],
    ]
    for ids in prompts:
        found = mtd.generate(model, method, ids, max_new_tokens=2)
        assert [c.token_ids for c in found] == [c.token_ids for c in plain]


@pytest.mark.parametrize("value", [True, 1.5, "1"])
def test_top_k_is_a_whole_number(value: Any) -> None:
    with pytest.raises(InputError, match="top_k must be a whole number"):
        mtd.Sampling(top_k=value)


@pytest.mark.parametrize(
    ("record", "said"),
    [
        ({"accuracies": 5}, "'accuracies' as rows"),
        ({"accuracies": [[10**400]]}, "'accuracies' as rows"),
        ({"accuracies": [["0.5"], ["x"]]}, "'accuracies' as rows"),
        ({"vocabulary": 5}, "'vocabulary' in"),
    ],
)
def test_records_of_heads(
    tmp_path: Path, record: dict[str, Any], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    values = {"format": 1, "method": "medusa", "base": "b", "options": {}, "record": record}
    (tmp_path / "method.json").write_text(json.dumps(values))
    assert main(["inspect", str(tmp_path)]) == 2
    assert said in one_line(capsys)
