"""Where the corpus comes from: what each source is, its licence, where it lies, how it is fetched.

How a source's files become documents is in `readers.py`.
"""

from __future__ import annotations

import dataclasses
import platform
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal
from urllib.parse import unquote

from train.texts import readers
from train.texts.documents import Document

_SECONDS = 1800


class MissingError(Exception):
    """A source is not there and cannot be fetched."""


@dataclasses.dataclass(frozen=True)
class Source:
    """One source, and how much of it a full corpus takes."""

    name: str
    kind: Literal["conversations", "maths", "code", "prose"]
    licence: str
    """An SPDX expression."""
    url: str
    """Of the project."""
    read: Callable[[Path], Iterator[Document]]
    pip: str = ""
    """The requirement that pip downloads."""
    deb: str = ""
    """The Debian package that apt downloads."""
    characters: int = 2**62
    """At most."""
    prompts: int = 10_000
    """At most."""
    notice: str = ""

    @property
    def package(self) -> str:
        """What its files come in; several sources may come in one."""
        return self.pip.partition("==")[0] or self.deb


@dataclasses.dataclass(frozen=True)
class Found:
    """A source that is on this machine."""

    source: Source
    path: Path
    version: str

    def documents(self) -> Iterator[Document]:
        """All of it, in an order of its own that is always the same."""
        for document in self.source.read(self.path):
            yield dataclasses.replace(
                document, id=f"{self.source.name}/{document.id}", source=self.source.name
            )

    def described(self) -> dict[str, Any]:
        """For the manifest."""
        known = {
            "kind": self.source.kind,
            "licence": self.source.licence,
            "project": self.source.url,
            "package": self.source.pip or self.source.deb,
            "file": self.path.name,
            "version": self.version,
            "notice": self.source.notice,
        }
        return {key: value for key, value in known.items() if value}


SOURCES: tuple[Source, ...] = (
    Source(
        "chitchat",
        "conversations",
        "MIT",
        "https://github.com/BYU-PCCL/chitchat-dataset",
        readers.chitchat,
        pip="chitchat-dataset==0.9.0",
    ),
    Source(
        "gsm8k",
        "maths",
        "MIT",
        "https://github.com/openai/grade-school-math",
        readers.gsm8k,
        notice="The training half alone; the test half is for evaluation.",
    ),
    Source(
        "python_stdlib",
        "code",
        "PSF-2.0",
        "https://www.python.org",
        readers.python_stdlib,
    ),
    Source(
        "transformers",
        "code",
        "Apache-2.0",
        "https://github.com/huggingface/transformers",
        readers.python_package,
        pip="transformers==5.23.0",
        prompts=2_000,
    ),
    Source(
        "sympy",
        "code",
        "BSD-3-Clause",
        "https://www.sympy.org",
        readers.python_package,
        pip="sympy==1.14.0",
        prompts=2_000,
    ),
    Source(
        "jax",
        "code",
        "Apache-2.0",
        "https://github.com/jax-ml/jax",
        readers.python_package,
        pip="jax==0.10.2",
        prompts=2_000,
    ),
    Source(
        "django",
        "code",
        "BSD-3-Clause",
        "https://www.djangoproject.com",
        readers.python_package,
        pip="Django==5.2",
        prompts=2_000,
    ),
    Source(
        "twisted",
        "code",
        "MIT",
        "https://twisted.org",
        readers.python_package,
        pip="twisted==24.11.0",
        prompts=2_000,
    ),
    Source(
        "networkx",
        "code",
        "BSD-3-Clause",
        "https://networkx.org",
        readers.python_package,
        pip="networkx==3.6.1",
        prompts=2_000,
    ),
    Source(
        "python_docs",
        "prose",
        "PSF-2.0",
        "https://docs.python.org/3.11/",
        readers.sphinx_docs,
        deb="python3.11-doc",
    ),
    Source(
        "linux_docs",
        "prose",
        "GPL-2.0-only",
        "https://docs.kernel.org",
        readers.linux_docs,
        deb="linux-doc-6.1",
        notice="Single files are under other licences, which they name (GFDL-1.1, BSD).",
    ),
    Source(
        "perl_docs",
        "prose",
        "Artistic-1.0-Perl OR GPL-1.0-or-later",
        "https://perldoc.perl.org",
        readers.perl_docs,
        deb="perl-doc",
    ),
    Source(
        "git_docs",
        "prose",
        "GPL-2.0-only",
        "https://git-scm.com/docs",
        readers.git_docs,
        deb="git-doc",
    ),
    Source(
        "llvm_docs",
        "prose",
        "Apache-2.0 WITH LLVM-exception",
        "https://llvm.org/docs/",
        readers.sphinx_docs,
        deb="llvm-14-doc",
    ),
    Source(
        "sqlalchemy_docs",
        "prose",
        "MIT",
        "https://docs.sqlalchemy.org",
        readers.sphinx_docs,
        deb="python-sqlalchemy-doc",
    ),
    Source(
        "pandas_docs",
        "prose",
        "BSD-3-Clause",
        "https://pandas.pydata.org/docs/",
        readers.sphinx_docs,
        deb="python-pandas-doc",
    ),
    Source(
        "cmake_docs",
        "prose",
        "BSD-3-Clause",
        "https://cmake.org/documentation/",
        readers.sphinx_docs,
        deb="cmake-doc",
    ),
    Source(
        "sympy_docs",
        "prose",
        "BSD-3-Clause",
        "https://docs.sympy.org",
        readers.sphinx_docs,
        deb="python-sympy-doc",
    ),
    Source(
        "postgresql_docs",
        "prose",
        "PostgreSQL",
        "https://www.postgresql.org/docs/15/",
        readers.postgresql_docs,
        deb="postgresql-doc-15",
    ),
)


def locate(source: Source, downloads: Path, gsm8k: str | None, *, offline: bool) -> Found:
    """Finds a source on this machine, or fetches it.

    Raises:
      MissingError: says why it is not to be had.
    """
    if source.name == "python_stdlib":
        version = platform.python_version()
        return Found(source, Path(sysconfig.get_paths()["stdlib"]), version)
    if source.name == "gsm8k":
        if gsm8k is None:
            raise MissingError("give its training half with --gsm8k FILE")
        if not Path(gsm8k).is_file():
            raise MissingError(f"no file at {gsm8k}")
        return Found(source, Path(gsm8k), "")
    # apt and pip spell names in files as they like: '_' or '-' before the version.
    name, _, wanted = (source.pip or f"{source.deb}==").partition("==")
    pattern = f"{name.replace('-', '[-_]')}[-_]{wanted}*"
    found = sorted(downloads.glob(pattern)) if downloads.is_dir() else []
    if not found and offline:
        raise MissingError(f"no {pattern.replace('[-_]', '-')} in {downloads}")
    if not found:
        _download(source, downloads)
        found = sorted(downloads.glob(pattern))
    if not found:
        raise MissingError("what was downloaded has another name than was expected")
    # apt writes the colon of an epoch as %3a.
    return Found(source, found[-1], wanted or unquote(found[-1].name.split("_")[1]))


def _download(source: Source, downloads: Path) -> None:
    """Fetches a package into a directory of its own, and moves it when it is whole."""
    if source.pip:
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"]
        command += ["--disable-pip-version-check", "--dest", ".", source.pip]
    else:
        command = ["apt-get", "download", "--quiet", source.deb]
    if shutil.which(command[0]) is None:
        raise MissingError(f"there is no {command[0]} here")
    downloads.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".part-", dir=downloads) as work:
        try:
            done = subprocess.run(
                command, cwd=work, capture_output=True, text=True, timeout=_SECONDS, check=False
            )
        except subprocess.TimeoutExpired:
            raise MissingError(f"{command[0]} took over {_SECONDS} seconds") from None
        if done.returncode != 0:
            lines = [line.strip() for line in done.stderr.splitlines() if line.strip()]
            errors = [line for line in lines if line.startswith(("ERROR:", "E:"))] or lines[-1:]
            said = errors[0][:200] if errors else "the download failed"
            raise MissingError(f"{said}; {source.package} may be put into {downloads} by hand")
        for file in Path(work).iterdir():
            file.rename(downloads / file.name)
