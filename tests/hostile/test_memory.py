"""Host memory that conversions and loading take, as a multiple of what comes out.

Measured with an output of 508 MB of float32, or 254 MB of bfloat16:

- Hugging Face (float32) to native: float32 1.13, bfloat16 1.25;
- GGUF (Q4_0 and Q8_0) to native: float32 1.13, bfloat16 1.24;
- native to Hugging Face: 1.35 to 1.41 in one file, 1.29 in files of 16 MB;
- native loaded as stored 1.13, with `mtd_jax.load` 1.14;
- onto a mesh of eight simulated devices with `mtd_jax.load`: native 1.27, Hugging Face 1.13.

Checkpoints are mapped into memory: hardly anything of them is read into buffers.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from mtd_jax.convert.conversions import to_native
from tests.support.checkpoints import hf_config, hf_shapes, write_hf
from tests.support.command_line import environment
from tests.support.gguf_files import write_gguf

pytestmark = pytest.mark.slow

Check = Callable[..., None]

# What importing and the first compilation take is there before the conversion starts. VmHWM is the
# peak of this process alone; getrusage's begins with that of the one that started it.
_MEASURE = """
import json, re, sys
from pathlib import Path
import gguf, jax, orbax.checkpoint, transformers
import mtd_jax
from mtd_jax.convert import conversions, load
from mtd_jax.sharding import make_mesh, parse_mesh
jax.block_until_ready(jax.numpy.ones(3) + 1)
def peak():
    status = Path("/proc/self/status").read_text()
    return 1024 * int(re.search(r"VmHWM:\\s*(\\d+) kB", status)[1])
def read():
    return int(re.search(r"rchar: (\\d+)", Path("/proc/self/io").read_text())[1])
kind, source, target, options = sys.argv[1:]
options = json.loads(options)
before, begun = peak(), read()
if kind == "load":
    mesh = options.pop("mesh", None)
    options["mesh"] = None if mesh is None else make_mesh(parse_mesh(mesh))
    mtd_jax.load(source, **options)
elif kind == "load_as_stored":
    load.load_as_stored(source)
else:
    getattr(conversions, kind)(Path(source), Path(target), **options)
print(json.dumps({"peak": peak() - before, "read": read() - begun}))
"""
_CONFIG = hf_config(
    hidden_size=1024,
    intermediate_size=4096,
    num_hidden_layers=6,
    num_attention_heads=16,
    num_key_value_heads=8,
    head_dim=64,
    vocab_size=16_000,
)
_FLOATS = 4 * sum(int(np.prod(shape)) for shape in hf_shapes(_CONFIG).values())


def measured(kind: str, source: Path, out: Path, **options: str | int) -> dict[str, int]:
    """Bytes of memory, and bytes that were read from files rather than mapped."""
    devices = 8 if "mesh" in options else 1
    done = subprocess.run(
        [sys.executable, "-c", _MEASURE, kind, str(source), str(out), json.dumps(options)],
        capture_output=True,
        text=True,
        env=environment(devices),
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return dict(json.loads(done.stdout))


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    rng = np.random.default_rng(0)
    tensors = {n: rng.standard_normal(s, np.float32) for n, s in hf_shapes(_CONFIG).items()}
    return write_hf(tmp_path_factory.mktemp("source"), _CONFIG, tensors, shards=3)


@pytest.fixture(scope="module")
def native(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("native") / "checkpoint"
    to_native(source, out)
    return out


def _quantised(path: Path, kind: str) -> Path:
    """Random blocks of a float16 scale and 4 or 8 bits a value."""
    rng = np.random.default_rng(0)
    tensors: dict[str, np.ndarray] = {}
    for name, shape in hf_shapes(_CONFIG).items():
        if len(shape) == 1:
            tensors[name] = np.ones(shape, np.float32)
            continue
        size = 2 + {"Q4_0": 16, "Q8_0": 32}[kind]
        blocks = rng.integers(0, 256, (shape[0], shape[1] // 32, size), np.uint8)
        blocks[..., :2] = np.array([0.01], np.float16).view(np.uint8)
        tensors[name] = blocks.reshape(shape[0], -1)
    return write_gguf(path, _CONFIG, tensors, quantized=kind)


@pytest.fixture
def check(tmp_path: Path, record_property: Callable[[str, object], None]) -> Check:
    def measure(kind: str, source: Path, most: float = 1.3, **options: str | int) -> None:
        size = _FLOATS // 2 if options.get("dtype") == "bfloat16" else _FLOATS
        ratio = measured(kind, source, tmp_path / "out", **options)["peak"] / size
        record_property("peak memory over output", ratio)  # in the file of --junit-xml
        assert 1 <= ratio < most  # below 1 it was not measured

    return measure


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_from_hugging_face(check: Check, source: Path, dtype: str) -> None:
    check("to_native", source, dtype=dtype)


@pytest.mark.parametrize(("kind", "dtype"), [("Q4_0", "bfloat16"), ("Q8_0", "float32")])
def test_from_gguf(tmp_path: Path, check: Check, kind: str, dtype: str) -> None:
    check("to_native", _quantised(tmp_path / "m.gguf", kind), dtype=dtype)


def test_to_hugging_face(check: Check, native: Path) -> None:
    check("to_huggingface", native, 1.45)


def test_to_hugging_face_in_shards(tmp_path: Path, check: Check, native: Path) -> None:
    """Tensors whose axes are joined are copied, but no more than a shard of them at a time."""
    shard = 16_000_000
    check("to_huggingface", native, 1.3 + shard / _FLOATS, shard_size=shard)
    assert len(list((tmp_path / "out").glob("*.safetensors"))) >= 20


@pytest.mark.parametrize("kind", ["load", "load_as_stored"])
def test_loading(check: Check, native: Path, kind: str) -> None:
    check(kind, native)


@pytest.mark.parametrize("place", ["native", "source"])
def test_loading_maps_the_files(tmp_path: Path, request: pytest.FixtureRequest, place: str) -> None:
    """Nothing but what describes the weights is read into buffers."""
    found = measured("load", request.getfixturevalue(place), tmp_path / "out")
    assert 0 < found["read"] < _FLOATS / 50


@pytest.mark.parametrize("place", ["native", "source"])
def test_loading_onto_a_mesh(check: Check, request: pytest.FixtureRequest, place: str) -> None:
    check("load", request.getfixturevalue(place), 1.4, mesh="tensor=2,fsdp=4")
