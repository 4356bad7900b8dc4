"""The corpus: the same bytes every time, nothing twice, nothing held out or excluded trained on."""

from __future__ import annotations

import gzip
import hashlib
import json
import shutil
import subprocess
import sysconfig
import zipfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest

from mtd_jax.errors import InputError
from mtd_jax.tokenizer import Tokenizer
from tests.support.tokenizers import byte_level
from train import corpus
from train.texts import readers, sources
from train.texts.assemble import ASKED, build, normalised, traces
from train.texts.documents import Document, dialogue
from train.texts.prompts import LONGEST, prompts_of
from train.texts.sources import Found, Source


def _found(name: str, documents: Iterable[Document], **changes: Any) -> Found:
    kept = list(documents)

    def read(path: Path) -> Iterator[Document]:
        yield from kept

    source = Source(name, "prose", "MIT", "https://example.org", read, **changes)
    return Found(source, Path("nowhere") / f"{name}.whl", "1.0")


def _talk(name: str, question: str, answer: str = "Because it is so.") -> Document:
    document = dialogue(name, [question, answer])
    assert document is not None
    return document


def _lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line]


@pytest.fixture
def found() -> list[Found]:
    questions = [_talk(str(i), f"Why is number {i} not prime, in short?") for i in range(300)]
    texts = [Document(str(i), text=f"Text {i} says: " + f"word{i} " * 60) for i in range(100)]
    return [_found("talks", questions), _found("texts", texts)]


def test_the_same_bytes_every_time(found: list[Found], tmp_path: Path) -> None:
    build(found, tmp_path / "a")
    build(found, tmp_path / "b")
    build(found, tmp_path / "c", seed=1)
    names = sorted(path.name for path in (tmp_path / "a").iterdir())
    assert names == ["held_out.jsonl", "manifest.json", "prompts.jsonl", "train.jsonl"]
    for name in names:
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
    ids = {d: [line["id"] for line in _lines(tmp_path / d / "train.jsonl")] for d in ("a", "c")}
    assert ids["a"] != ids["c"]
    assert sorted(ids["a"]) == sorted(ids["c"])  # the seed orders; what is held out stays
    # Sources are mixed: no long run of one of them.
    runs = "".join(line["source"][1] for line in _lines(tmp_path / "a" / "train.jsonl"))
    assert "e" * 20 not in runs


def test_each_document_once_and_on_one_side(found: list[Found], tmp_path: Path) -> None:
    again = [_talk(f"again-{i}", f"why is NUMBER {i} not prime (in short)?") for i in range(300)]
    manifest = build([*found, _found("copies", again)], tmp_path / "out", share=0.2)
    assert manifest["left_out"] == {"duplicates": 300}
    train, held_out = (_lines(tmp_path / "out" / f"{n}.jsonl") for n in ("train", "held_out"))
    assert len(train) + len(held_out) == 400
    assert 40 < len(held_out) < 120
    known = [normalised(Document.parse(json.dumps(v).encode()).content) for v in train + held_out]
    assert len(set(known)) == 400
    # A document is on the same side whatever else is there.
    build([_found("copies", again)], tmp_path / "alone", share=0.2)
    sides = {
        line["id"].partition("-")[2]: name
        for name in ("train", "held_out")
        for line in _lines(tmp_path / "alone" / f"{name}.jsonl")
    }
    for name, lines in (("train", train), ("held_out", held_out)):
        for line in lines:
            if line["source"] == "talks":
                assert sides[line["id"].partition("/")[2]] == name


def test_excluded_prompts_are_in_nothing(found: list[Found], tmp_path: Path) -> None:
    long = "a rather long line about the number seventeen, which occurs in no other document"
    talks = [_talk("embedded", f"Answer this:\n{long}\nThank you.")]
    passage = "\n\n".join(f"{long} and {long}, {i} times, says the author." for i in range(4))
    excluded = ["Why is number 7 not prime, in short?", f"{long}.", passage.split("\n\n")[2]]
    extra = [_found("more", talks), _found("passages", [Document("p", text=passage)])]
    manifest = build([*found, *extra], tmp_path / "out", excluded=excluded, share=0.0)
    assert manifest["left_out"] == {"excluded": 2}
    ids = {line["id"] for line in _lines(tmp_path / "out" / "train.jsonl")}
    assert "talks/7" not in ids
    assert "talks/8" in ids
    assert "more/embedded" not in ids
    prompts = [line["messages"][0]["content"] for line in _lines(tmp_path / "out/prompts.jsonl")]
    banned = set().union(*map(traces, excluded))
    assert all(banned.isdisjoint(traces(prompt)) for prompt in prompts)


def test_prompts_are_user_turns_of_training_documents(found: list[Found], tmp_path: Path) -> None:
    build(found, tmp_path / "out", share=0.2)
    prompts = _lines(tmp_path / "out" / "prompts.jsonl")
    train = {line["id"]: line for line in _lines(tmp_path / "out" / "train.jsonl")}
    assert len({prompt["id"] for prompt in prompts}) == len(prompts) > 200
    for prompt in prompts:
        assert [m["role"] for m in prompt["messages"]] == ["user"]
        assert prompt["id"].partition("#")[0] in train


def test_the_manifest_says_what_is_there(found: list[Found], tmp_path: Path) -> None:
    byte_level().save(tmp_path)
    tokenizer = Tokenizer.load(tmp_path)
    out = tmp_path / "out"
    manifest = build(found, out, tokenizer=tokenizer, about={"command": "made by a test"})
    assert json.loads((out / "manifest.json").read_text()) == manifest
    assert manifest["command"] == "made by a test"
    talks = manifest["sources"]["talks"]
    assert (talks["licence"], talks["project"]) == ("MIT", "https://example.org")
    assert talks["train_documents"] + talks["held_out_documents"] == 300
    assert manifest["total"]["tokens"] >= manifest["total"]["train_documents"] * 5
    for name, digest in manifest["files"].items():
        assert hashlib.sha256((out / name).read_bytes()).hexdigest() == digest


def test_sources_give_no_more_than_their_share(found: list[Found], tmp_path: Path) -> None:
    few = _found("few", [Document(str(i), text=f"{i} " + "letters " * 50) for i in range(50)])
    limited = [
        Found(Source(**{**vars(few.source), "characters": 2000, "prompts": 0}), few.path, "")
    ]
    manifest = build(limited, tmp_path / "out")
    assert 2000 <= manifest["total"]["characters"] < 2500
    assert _lines(tmp_path / "out" / "prompts.jsonl") == []


def test_an_output_that_is_there_is_kept(found: list[Found], tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").touch()
    with pytest.raises(InputError, match="is there already"):
        build(found, tmp_path / "out")
    broken = Found(Source("x", "code", "MIT", "", lambda path: 1 // 0), Path("x"), "")  # type: ignore[arg-type,return-value]
    with pytest.raises(ZeroDivisionError):
        build([broken], tmp_path / "other")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out"]


def test_code_and_prose_become_questions() -> None:
    function = "def double(x):\n" + "    x = x + x  # twice as much as it was before\n" * 8
    module = Document("a/b.py", text=f"import os\n\n\n{function}\n\nclass A:\n    pass\n")
    ((name, turn),) = prompts_of(module)
    assert name == "a/b.py#double-4"
    assert turn.endswith(f"```python\n{function.rstrip()}\n```")
    paragraph = "Words about something that goes on for a while, as prose does. " * 5 + "End."
    ((_, turn),) = prompts_of(
        Document("a.rst", text=f"Title\n=====\n\n{paragraph}\n\n::\n\n   x = 1")
    )
    assert turn.endswith(f"\n\n{paragraph}")
    assert list(prompts_of(Document("broken.py", text="def f(:"))) == []
    assert list(prompts_of(_talk("x", "y" * (LONGEST + 1)))) == []


def _wheel(path: Path, files: dict[str, str]) -> Path:
    with zipfile.ZipFile(path, "w") as wheel:
        for name, text in files.items():
            wheel.writestr(name, text)
    return path


@pytest.fixture
def debian(tmp_path: Path) -> Callable[[dict[str, bytes]], Path]:
    """Makes Debian packages of files, named below /usr/share."""
    if shutil.which("dpkg-deb") is None:
        pytest.skip("there is no dpkg-deb here")

    def make(files: dict[str, bytes]) -> Path:
        tree = tmp_path / "tree"
        control = "Package: x-doc\nVersion: 1:2-3\nArchitecture: all\nDescription: x\n"
        control += "Maintainer: Nobody <nobody@example.org>\n"
        for name, data in {"DEBIAN/control": control.encode(), **files}.items():
            path = tree / (name if name.startswith("DEBIAN") else f"usr/share/{name}")
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(data)
        path = tmp_path / "x-doc_1%3a2-3_all.deb"
        command = ["dpkg-deb", "--root-owner-group", "--build", str(tree), str(path)]
        subprocess.run(command, check=True, capture_output=True)
        return path

    return make


def test_conversations_are_merged_into_turns(tmp_path: Path) -> None:
    says = [("a", "Hello"), ("b", "Hi"), ("b", "there"), ("a", "So?"), ("b", "Fine"), ("a", "Bye")]
    value = {"x": {"messages": [[{"sender": s, "text": t}] for s, t in says]}}
    path = tmp_path / "chitchat_dataset-0.9.0-py3-none-any.whl"
    _wheel(path, {"chitchat_dataset/dataset.json": json.dumps(value)})
    (document,) = readers.chitchat(path)
    turns = [(m["role"], m["content"]) for m in document.messages]
    assert turns == [
        ("user", "Hello"),
        ("assistant", "Hi\nthere"),
        ("user", "So?"),
        ("assistant", "Fine"),
    ]


def test_the_standard_library_without_its_tests(tmp_path: Path) -> None:
    for name in ("ast.py", "json/decoder.py", "test/x.py", "json/tests/y.py", "site-packages/z.py"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("# a module that is long enough to be worth reading\n" * 9)
    (tmp_path / "bad.py").write_bytes(b"# coding: nonsense\n" * 30)
    assert [d.id for d in readers.python_stdlib(tmp_path)] == ["ast.py", "json/decoder.py"]


def test_gsm8k_is_its_training_half(tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    messages = [{"role": "user", "content": "1+1?"}, {"role": "assistant", "content": "2"}]
    path.write_text(json.dumps({"id": "gsm8k-train-0", "messages": messages}))
    assert [d.id for d in readers.gsm8k(path)] == ["gsm8k-train-0"]
    path.write_text(json.dumps({"id": "gsm8k-test-0", "messages": messages}))
    with pytest.raises(InputError, match="line 1: 'gsm8k-test-0' is of the test half"):
        list(readers.gsm8k(path))
    path.write_text('{"question": "1+1?"}')
    with pytest.raises(InputError, match="line 1 has no messages"):
        list(readers.gsm8k(path))


def test_a_package_without_tests_and_generated_files(tmp_path: Path) -> None:
    text = "# a module that is long enough to be worth reading\n" * 9
    files = {
        "pack/core.py": text,
        "pack/tests/test_core.py": text,
        "pack/modeling.py": f"# This file was automatically generated from modular.py.\n{text}",
        "pack/late.py": f"{text}\n\n{text}\n# automatically generated is said too late\n",
        "pack/short.py": "x = 1\n",
        "pack/data.json": text,
    }
    path = _wheel(tmp_path / "pack-1.0-py3-none-any.whl", files)
    assert [d.id for d in readers.python_package(path)] == ["pack/core.py", "pack/late.py"]


PARAGRAPH = b"Words about something that goes on for a while, as prose does. " * 5


@pytest.mark.parametrize(
    ("read", "files", "found"),
    [
        (
            readers.sphinx_docs,
            {
                "doc/x/html/_sources/a.rst.txt": PARAGRAPH,
                "doc/x/html/_sources/b.rst.txt": b"short",
                "doc/x/html/a.html": PARAGRAPH,
                "doc/y/rst/c.rst": PARAGRAPH + b".",
            },
            {"x/html/_sources/a.rst.txt", "y/rst/c.rst"},
        ),
        (
            readers.linux_docs,
            {
                "doc/linux-doc/Documentation/a.rst.gz": gzip.compress(PARAGRAPH),
                "doc/linux-doc/Documentation/translations/b.rst.gz": gzip.compress(PARAGRAPH),
            },
            {"linux-doc/Documentation/a.rst.gz"},
        ),
        (
            readers.perl_docs,
            {"perl/5.36.0/pod/perlintro.pod": PARAGRAPH, "perl/5.36.0/strict.pm": PARAGRAPH},
            {"perl/5.36.0/pod/perlintro.pod"},
        ),
        (
            readers.git_docs,
            {"doc/git-doc/git-add.txt": PARAGRAPH, "doc/git-doc/git-add.html": PARAGRAPH},
            {"git-doc/git-add.txt"},
        ),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_manuals_of_debian(
    debian: Callable[[dict[str, bytes]], Path],
    read: Callable[[Path], Iterator[Document]],
    files: dict[str, bytes],
    found: set[str],
) -> None:
    documents = list(read(debian(files)))
    assert {d.id for d in documents} == found
    assert all(d.text.startswith("Words about something") for d in documents)


def test_pages_of_a_manual(debian: Callable[[dict[str, bytes]], Path]) -> None:
    """As DocBook writes them: a bar above, paragraphs broken anywhere, code in its lines."""
    page = (
        '<?xml version="1.0"?><html><head><title>VACUUM</title><style>p {}</style></head><body>'
        '<div class="navheader"><div>Prev</div><a>Up</a></div><div class="refentry"><h2>Synopsis'
        '</h2><pre class="synopsis">\nVACUUM [ <em>option</em> ]\n\n  FULL &lt;x&gt;\n</pre><p>\n'
        f"   <code>VACUUM</code> reclaims\n   storage.<br />{PARAGRAPH.decode()}\n  </p></div>"
        '<div class="navfooter"><hr />Next</div></body></html>'
    )
    path = debian({"doc/postgresql-doc-15/html/sql-vacuum.html": page.encode()})
    (document,) = readers.postgresql_docs(path)
    assert document.id == "postgresql-doc-15/html/sql-vacuum.html"
    assert document.text == (
        "Synopsis\n\nVACUUM [ option ]\n\n  FULL <x>\n\n"
        f"VACUUM reclaims storage. {PARAGRAPH.decode().strip()}"
    )


def test_a_damaged_archive_is_named(tmp_path: Path) -> None:
    for name in ("x-1.0-py3-none-any.whl", "x-doc_1_all.deb"):
        path = tmp_path / name
        path.write_bytes(b"no archive")
        with pytest.raises(InputError, match="is damaged"):
            list(readers.python_package(path))
    path = _wheel(tmp_path / "y-1.0-py3-none-any.whl", {"README.md": "none"})
    with pytest.raises(InputError, match=r"holds no \*\.py"):
        list(readers.python_package(path))


@pytest.fixture
def _small_world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A standard library of two files, so that building takes no time."""
    library = tmp_path / "lib"
    library.mkdir()
    for name in ("one", "two"):
        (library / f"{name}.py").write_text(f"# the module {name}\n" + f"{name} = 1  # set\n" * 30)
    monkeypatch.setattr(sysconfig, "get_paths", lambda: {"stdlib": str(library)})


@pytest.mark.usefixtures("_small_world")
def test_the_program(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """What is not there is named, left out when told so, and not asked for by a small corpus."""
    place = [
        "--offline",
        "--downloads",
        str(tmp_path / "downloads"),
        "--out",
        str(tmp_path / "out"),
    ]
    with pytest.raises(InputError, match=r"cannot have chitchat.*no chitchat.*--skip chitchat"):
        corpus.main(place)
    others = [s.name for s in sources.SOURCES if s.name not in ("python_stdlib", "gsm8k")]
    with pytest.raises(InputError, match="cannot have gsm8k: give its training half with --gsm8k"):
        corpus.main([*place, "--skip", *others])
    with pytest.raises(InputError, match=r"unknown source 'gsm'.*gsm8k"):
        corpus.main([*place, "--skip", "gsm"])
    with pytest.raises(InputError, match="cannot have gsm8k"):
        corpus.main([*place, "--skip", "chitchat-dataset"])  # by its package
    with pytest.raises(InputError, match="share from 0 to 1"):
        corpus.main([*place, "--held-out", "1"])
    assert not (tmp_path / "out").exists()
    assert corpus.main([*place, "--size", "small"]) == 0
    assert "python_stdlib" in capsys.readouterr().out
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert manifest["sources"].keys() == {"python_stdlib", ASKED}
    assert manifest["sources"][ASKED]["prompts"] > 100
    assert manifest["command"].startswith("python -m train.corpus --offline")


@pytest.mark.usefixtures("_small_world")
def test_a_download_that_fails_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(command: list[str], cwd: str, **kwargs: Any) -> Any:
        (Path(cwd) / "half.tar.gz").write_bytes(b"half")
        return subprocess.CompletedProcess(command, 1, "", "noise\nno route to it\n")

    monkeypatch.setattr(subprocess, "run", fails)
    (source,) = (s for s in sources.SOURCES if s.name == "chitchat")
    with pytest.raises(sources.MissingError, match="no route to it"):
        sources.locate(source, tmp_path / "downloads", None, offline=False)
    assert list((tmp_path / "downloads").iterdir()) == []

    def works(command: list[str], cwd: str, **kwargs: Any) -> Any:
        (Path(cwd) / "chitchat_dataset-0.9.0-py3-none-any.whl").write_bytes(b"whole")
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(subprocess, "run", works)
    found = sources.locate(source, tmp_path / "downloads", None, offline=False)
    assert (found.version, found.path.read_bytes()) == ("0.9.0", b"whole")
    monkeypatch.setattr(subprocess, "run", fails)  # now it is there
    assert sources.locate(source, tmp_path / "downloads", None, offline=False) == found


def test_the_version_of_a_debian_package(tmp_path: Path) -> None:
    (tmp_path / "git-doc_1%3a2.39.5-0_all.deb").touch()
    (source,) = (s for s in sources.SOURCES if s.name == "git_docs")
    assert sources.locate(source, tmp_path, None, offline=True).version == "1:2.39.5-0"
