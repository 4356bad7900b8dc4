"""Broken and hostile checkpoints: one line, exit code 2, nothing written."""

import json
import os
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mtd_jax.convert.conversions import to_native
from mtd_jax.convert.huggingface import read_config
from mtd_jax.convert.load import load, load_as_stored
from mtd_jax.convert.native import write_native
from mtd_jax.convert.safetensors_files import read_header
from mtd_jax.errors import InputError
from tests.support.checkpoints import hf_config, hf_tensors, write_hf
from tests.support.command_line import assert_refused, run_commands
from tests.support.tokenizers import byte_level

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"


def rewrite_header(path: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    """Replaces the header by what `change` makes of it (an object, or raw text)."""
    content = path.read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    header = json.loads(content[8 : 8 + length])
    changed = change(header)
    text = changed if isinstance(changed, str) else json.dumps(changed)
    path.write_bytes(struct.pack("<Q", len(text)) + text.encode() + content[8 + length :])


def edit(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def with_entry(name: str, **changes: Any) -> Callable[[dict[str, Any]], dict[str, Any]]:
    return lambda header: {**header, name: {**header[name], **changes}}


NORM = "model.norm.weight"
HEADERS: list[tuple[str, Callable[[dict[str, Any]], Any], str]] = [
    ("overlap", with_entry(NORM, data_offsets=[0, 128]), "overlaps|gap|truncated"),
    ("outside", with_entry(NORM, data_offsets=[2**40, 2**40 + 128]), "gap|truncated"),
    ("backwards", with_entry(NORM, data_offsets=[128, 0]), "do not fit"),
    ("negative", with_entry(NORM, data_offsets=[-128, 0]), "no valid data_offsets"),
    ("fraction", with_entry(NORM, data_offsets=[0.0, 128.0]), "no valid data_offsets"),
    ("three", with_entry(NORM, data_offsets=[0, 1, 2]), "no valid data_offsets"),
    ("shape", with_entry(NORM, shape=[33]), "do not fit shape"),
    ("huge", with_entry(NORM, shape=[2**62, 2**62]), "do not fit shape"),
    ("negative size", with_entry(NORM, shape=[-1]), "no valid shape"),
    ("text size", with_entry(NORM, shape="32"), "no valid shape"),
    ("boolean size", with_entry(NORM, shape=[True]), "no valid shape"),
    ("dtype", with_entry(NORM, dtype="Q4_0"), "unknown dtype Q4_0"),
    ("no dtype", with_entry(NORM, dtype=None), "unknown dtype"),
    ("integers", with_entry(NORM, dtype="I32"), "dtype I32"),
    ("no entry", lambda h: {**h, NORM: None}, "no description"),
    ("twice", lambda h: json.dumps(h)[:-1] + f', "{NORM}": {json.dumps(h[NORM])}}}', "twice"),
    ("list", lambda h: [h], "must hold a JSON object"),
    ("no JSON", lambda h: "{" * 50, "not JSON"),
    ("deep", lambda h: '{"a":' * 100_000 + "1" + "}" * 100_000, "too deeply"),
    ("not UTF-8", lambda h: json.dumps(h)[:-1] + ', "\udcff": 1}', "not JSON"),
]


@pytest.mark.parametrize(
    ("change", "message"), [h[1:] for h in HEADERS[:-1]], ids=[h[0] for h in HEADERS[:-1]]
)
def test_safetensors_headers(
    tmp_path: Path, change: Callable[[dict[str, Any]], Any], message: str
) -> None:
    rewrite_header(write_hf(tmp_path) / SINGLE, change)
    with pytest.raises(InputError, match=message) as caught:
        load(tmp_path)
    assert SINGLE in str(caught.value)


@pytest.mark.parametrize("keep", [0, 4, 8, 100, -1, -4000])
def test_truncated_safetensors(tmp_path: Path, keep: int) -> None:
    file = write_hf(tmp_path) / SINGLE
    file.write_bytes(file.read_bytes()[:keep])
    with pytest.raises(InputError, match="truncated"):
        load(tmp_path)


def test_bytes_behind_the_last_tensor(tmp_path: Path) -> None:
    file = write_hf(tmp_path) / SINGLE
    file.write_bytes(file.read_bytes() + b"payload")
    with pytest.raises(InputError, match="behind its last tensor"):
        load(tmp_path)


def test_a_header_longer_than_any(tmp_path: Path) -> None:
    file = write_hf(tmp_path) / SINGLE
    with file.open("r+b") as stream:
        stream.write(struct.pack("<Q", 2**63))
    with pytest.raises(InputError, match="truncated"):
        load(tmp_path)
    os.truncate(file, 2**31)  # sparse
    with file.open("r+b") as stream:
        stream.write(struct.pack("<Q", 2**30))
    with pytest.raises(InputError, match="absurd"):
        load(tmp_path)


def test_random_damage_never_gives_another_error(tmp_path: Path) -> None:
    file = write_hf(tmp_path, hf_config(num_hidden_layers=1)) / SINGLE
    content = file.read_bytes()
    rng = np.random.default_rng(0)
    for _ in range(300):
        damaged = bytearray(content)
        for _ in range(int(rng.integers(1, 4))):
            damaged[int(rng.integers(0, 1500))] = int(rng.integers(0, 256))
        file.write_bytes(bytes(damaged))
        try:
            read_header(file)
        except InputError:
            continue


@pytest.mark.parametrize(
    "target", ["../secret.safetensors", "/etc/passwd", "sub/x.safetensors", "..", "", ".", 3, None]
)
def test_an_index_that_points_elsewhere(tmp_path: Path, target: Any) -> None:
    write_hf(tmp_path / "secret")
    (tmp_path / "secret" / SINGLE).rename(tmp_path / "secret.safetensors")
    directory = write_hf(tmp_path / "m", shards=2)
    weight_map = json.loads((directory / INDEX).read_text())["weight_map"]
    edit(directory / INDEX, weight_map=weight_map | {NORM: target})
    with pytest.raises(InputError, match=r"outside the directory|no such file"):
        load(directory)


@pytest.mark.parametrize("file", [SINGLE, "other.safetensors"])
def test_a_link_that_leads_elsewhere(tmp_path: Path, file: str) -> None:
    write_hf(tmp_path / "secret")
    directory = write_hf(tmp_path / "m")
    (directory / SINGLE).unlink()
    (directory / file).symlink_to(tmp_path / "secret" / SINGLE)
    with pytest.raises(InputError, match="link to a place outside"):
        load(directory)


def test_links_of_the_hub_cache_are_followed(tmp_path: Path) -> None:
    directory = write_hf(tmp_path / "hub" / "snapshots" / "0123")
    (tmp_path / "hub" / "blobs").mkdir()
    (directory / SINGLE).rename(tmp_path / "hub" / "blobs" / "abcd")
    (directory / SINGLE).symlink_to(Path("../../blobs/abcd"))
    assert load(directory).config.family == "llama"


def test_tokenizer_files_are_copied_from_the_directory_or_the_hub_cache(tmp_path: Path) -> None:
    directory = write_hf(tmp_path / "hub" / "snapshots" / "0123", hf_config(vocab_size=400))
    byte_level().save(directory)
    (tmp_path / "hub" / "blobs").mkdir()
    file = directory / "tokenizer_config.json"
    content = file.read_bytes()
    file.rename(tmp_path / "hub" / "blobs" / "abcd")
    file.symlink_to(Path("../../blobs/abcd"))
    to_native(directory, tmp_path / "native")
    assert (tmp_path / "native" / file.name).read_bytes() == content
    assert not (tmp_path / "native" / file.name).is_symlink()

    (tmp_path / "secret").write_text("{}")
    makers: dict[str, Callable[[Path], None]] = {
        "link to a place outside": lambda path: path.symlink_to(tmp_path / "secret"),
        "link to a place": lambda path: path.symlink_to("/dev/zero"),
        "circle|no such file": lambda path: path.symlink_to(path.name),
        "no regular file": os.mkfifo,
        r"merges\.txt is no regular file": Path.mkdir,
        "no such file": lambda path: path.symlink_to("nowhere"),
    }
    for number, (said, make) in enumerate(makers.items()):
        other = write_hf(tmp_path / str(number), hf_config(vocab_size=400))
        byte_level().save(other)
        make(other / "merges.txt")
        with pytest.raises(InputError, match=said):
            to_native(other, tmp_path / f"{number}-out")
        assert not (tmp_path / f"{number}-out").exists()


def test_index_and_files_disagree(tmp_path: Path) -> None:
    directory = write_hf(tmp_path, shards=2)
    weight_map = json.loads((directory / INDEX).read_text())["weight_map"]
    first, second = sorted(set(weight_map.values()))
    other = {first: second, second: first}
    edit(directory / INDEX, weight_map=weight_map | {NORM: other[weight_map[NORM]]})
    with pytest.raises(InputError, match=f"'{NORM}' is not in"):
        load(directory)
    edit(directory / INDEX, weight_map=weight_map | {"extra": first})
    with pytest.raises(InputError, match="'extra' is not in"):
        load(directory)
    nothing: list[Any] = [{}, [], None]
    for broken in nothing:
        edit(directory / INDEX, weight_map=broken)
        with pytest.raises(InputError, match="no weight_map"):
            load(directory)


def test_missing_files_are_named_together(tmp_path: Path) -> None:
    directory = write_hf(tmp_path, shards=3)
    first, second, _ = sorted(p.name for p in directory.glob("*.safetensors"))
    for name in (first, second):
        (directory / name).unlink()
    with pytest.raises(InputError, match=rf"no such file in .*: {first}, {second} \(3 are needed"):
        load(directory)


def test_a_tensor_in_two_files(tmp_path: Path) -> None:
    directory = write_hf(tmp_path, shards=2)
    (directory / INDEX).unlink()
    first = sorted(directory.glob("*.safetensors"))[0]
    (directory / "model-00003-of-00003.safetensors").write_bytes(first.read_bytes())
    with pytest.raises(InputError, match="is in both"):
        load(directory)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "consolidated.00.pth", "model.pt", "w.pkl"])
def test_pickles_are_never_read(tmp_path: Path, name: str) -> None:
    directory = write_hf(tmp_path)
    (directory / SINGLE).rename(directory / name)
    for path in (directory, directory / name):
        with pytest.raises(InputError, match=r"pickled weights .* convert them to safetensors"):
            load(path)
    (directory / "config.json").unlink()
    with pytest.raises(InputError, match=r"pickled weights .* convert them to safetensors"):
        load(directory)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "not JSON"),
        ("{", "not JSON"),
        ("[]", "must hold a JSON object"),
        ('"llama"', "must hold a JSON object"),
        ("[" * 100_000, "too deeply|not JSON"),
        ('{"a":' * 100_000, "too deeply|not JSON"),
        ("{}", "no 'model_type'"),
        ('{"model_type": "llama", "model_type": "qwen2"}', "twice"),
        ('{"model_type": ["llama"]}', "no 'model_type'"),
        ('{"model_type": "lama"}', "did you mean 'llama'"),
        ("\ufeff{}", "not JSON"),
    ],
)
def test_configs_that_are_none(tmp_path: Path, text: str, message: str) -> None:
    (write_hf(tmp_path) / "config.json").write_text(text)
    with pytest.raises(InputError, match=message):
        load(tmp_path)


def test_a_config_of_another_model_names_the_shapes(tmp_path: Path) -> None:
    tensors = hf_tensors(hf_config())
    with pytest.raises(InputError, match=r"'lm_head\.weight' is \[99, 32\], not \[99, 64\]"):
        load(write_hf(tmp_path, hf_config(hidden_size=64, num_attention_heads=8), tensors))


def test_a_broken_generation_config(tmp_path: Path) -> None:
    directory = write_hf(tmp_path)
    (directory / "generation_config.json").write_text('{"eos_token_id": "x"}')
    with pytest.raises(InputError, match="eos_token_id"):
        read_config(directory)


CONFIGS: list[dict[str, Any]] = [
    {"num_attention_heads": 0},
    {"num_hidden_layers": 10**9},
    {"num_hidden_layers": 10**400},
    {"hidden_size": 64},
    {"rms_norm_eps": "x"},
    {"rms_norm_eps": 1e999},
    {"rms_norm_eps": 10**400},
    {"rope_theta": 10**400},
    {"rope_theta": [1]},
    {"rope_scaling": {"rope_type": "dynamic", "factor": {}}},
    {"rope_scaling": {"rope_type": "linear", "factor": 10**400}},
    {"rope_scaling": {"rope_type": "yarn"}, "max_position_embeddings": 10**400},
    {"rope_scaling": {"rope_type": "dynamic", "factor": 2}, "head_dim": 2},
    {"eos_token_id": {"a": 1}},
    {"vocab_size": None},
    {"architectures": 3, "model_type": "qwen3"},
    {"tie_word_embeddings": "no"},
    {"quantization_config": {"quant_method": "gptq"}},
]


def test_the_command_line_says_one_line_and_writes_nothing(tmp_path: Path) -> None:
    """Every kind of bad input through `mtd` itself, in one process."""
    sources: list[Path] = []
    for number, changes in enumerate(CONFIGS):
        sources.append(write_hf(tmp_path / f"c{number}"))
        edit(sources[-1] / "config.json", **changes)
    tensors = hf_tensors(hf_config())
    tensors["model.layers.1.mlp.up_proj.weight"][2, 3] = np.nan
    sources.append(write_hf(tmp_path / "nan", tensors=tensors))
    sources.append(tmp_path / "absent")
    (tmp_path / "empty").mkdir()
    sources.append(tmp_path / "empty")
    (tmp_path / "text.txt").write_text("hello")
    sources.append(tmp_path / "text.txt")
    (tmp_path / "no.gguf").write_bytes(b"GGUF")
    sources.append(tmp_path / "no.gguf")
    sources.append(write_hf(tmp_path / "tokenizer"))
    (sources[-1] / "tokenizer.json").write_text("{")
    sources.append(write_hf(tmp_path / "sentencepiece"))
    (sources[-1] / "tokenizer.model").write_text("none")
    out = tmp_path / "results" / "out"
    commands: list[list[str | Path]] = []
    for source in sources:
        commands += [["convert", "from-hf", source, out], ["convert", "to-hf", source, out]]
    good = write_hf(tmp_path / "good")
    # These lie in what `inspect` does not read.
    unread = ("nan", "tokenizer", "sentencepiece")
    commands += [["inspect", source] for source in sources if source.name not in unread]
    commands += [
        ["convert", "from-hf", good, good],
        ["convert", "from-hf", good, tmp_path / "text.txt"],
        ["convert", "from-hf", good, tmp_path / "text.txt" / "below"],
        ["convert", "from-hf", good, out, "--dtype", "float8"],
        ["convert", "from-hf", good],
        ["convert", "sideways", good, out],
        ["convert", "to-hf", good, out, "--shard-size", "-1"],
        ["convert", "to-hf", good, out, "--shard-size", "100MB"],
        ["convert"],
        ["fetch", "smollm2-135m-instrct", "--out", out],
        ["fetch", "smollm2-135m-instruct"],
        ["inspect", good, "--jsn"],
    ]
    for command, outcome in zip(commands, run_commands(commands), strict=True):
        assert assert_refused(outcome), command
    assert not out.exists()
    assert not (tmp_path / "results").exists() or not list((tmp_path / "results").iterdir())


def test_native_checkpoints_through_the_command_line(tmp_path: Path) -> None:
    native = tmp_path / "native"
    to_native(write_hf(tmp_path / "good"), native)
    config = json.loads((native / "config.json").read_text())
    models: list[dict[str, Any]] = [
        {"num_heads": "4"},
        {"num_layers": 1e9},
        {"norm_eps": None},
        {"rope": []},
        {"rope": {"kind": "spiral"}},
        {"rope": {"truncate": []}},
        {"rope": {"kind": "dynamic", "original_max_position": 64}, "head_dim": 2},
        {"eos_token_ids": [2.5]},
        {"sliding_windows": [1]},
        {"sliding_windows": 1},
        {"hidden_sise": 3},
    ]
    changes = [{"model": config["model"] | model} for model in models]
    changes += [{"files": {name: [1, None]}} for name in ("a\0b", "\ud800", "a" * 5000)]
    changes += [{"source": "\ud800"}]
    commands: list[list[str | Path]] = []
    for number, change in enumerate(changes):
        damaged = shutil.copytree(native, tmp_path / str(number))
        (damaged / "config.json").write_text(json.dumps(config | change))
        commands.append(["convert", "to-hf", damaged, tmp_path / "out"])
    commands.append(["inspect", damaged])
    params = load_as_stored(native).params
    for number, value in enumerate((np.nan, np.inf)):
        weights = params.replace(embedding=params.embedding.at[3, 2].set(value))
        (tmp_path / f"weights{number}").mkdir()
        write_native(tmp_path / f"weights{number}", weights, fingerprint="0", source="none")
        commands.append(["convert", "to-hf", tmp_path / f"weights{number}", tmp_path / "out"])
        commands.append(["generate", "--model", tmp_path / f"weights{number}", "--prompt", "a"])
    said = [assert_refused(outcome) for outcome in run_commands(commands)]
    assert sum("holds NaN or infinite weights: embedding" in line for line in said) == 4
    assert not (tmp_path / "out").exists()
