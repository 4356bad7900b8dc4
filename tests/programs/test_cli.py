"""The commands on a tiny checkpoint, as a user runs them (in this process, through `main`)."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import mtd_jax as mtd
from mtd_jax.cli.main import main
from tests.support.checkpoints import hf_config, write_hf
from tests.support.command_line import ROOT, run_program
from tests.support.tokenizers import byte_level

PROMPTS = [
    {"id": "a", "prompt": "The quick brown"},
    {"id": "b", "messages": [{"role": "user", "content": "hello"}], "max_new_tokens": 5},
    {"id": "c", "token_ids": [5, 6, 7]},
]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A native checkpoint with a tokenizer, converted by the command itself."""
    base = tmp_path_factory.mktemp("model")
    source = write_hf(base / "hf", hf_config(vocab_size=400, eos_token_id=399))
    byte_level().save(source)
    assert main(["convert", "from-hf", str(source), str(base / "native")]) == 0
    return base / "native"


@pytest.fixture
def prompts(tmp_path: Path) -> str:
    path = tmp_path / "prompts.jsonl"
    path.write_text("\n".join(json.dumps(p) for p in PROMPTS) + "\n\n")
    return str(path)


def _json(capsys: pytest.CaptureFixture[str], *argv: str) -> Any:
    assert main(argv) == 0
    return json.loads(capsys.readouterr().out)


def test_generate_json(model: Path, prompts: str, capsys: pytest.CaptureFixture[str]) -> None:
    argv = ["generate", "--model", str(model), "--prompts", prompts, "--max-new-tokens", "9"]
    report = _json(capsys, *argv, "--json")
    assert {"model", "method", "outputs", "metrics"} <= report.keys()
    assert (report["model"], report["method"]) == (str(model), "ar")
    assert [o["id"] for o in report["outputs"]] == ["a", "b", "c"]
    assert [len(o["token_ids"]) for o in report["outputs"]] == [9, 5, 9]
    for output in report["outputs"]:
        assert output["finish_reason"] == "length"
        assert output["metrics"]["tokens"] == len(output["token_ids"])
        assert output["prompt_tokens"] > 0
    metrics = report["metrics"]
    assert metrics["tokens"] == 23
    assert metrics["tokens_per_second"] == pytest.approx(23 / metrics["seconds"], rel=1e-3)
    assert metrics["compile_seconds"] >= 0
    batched = _json(capsys, *argv, "--json", "--batch-size", "3")
    assert [o["token_ids"] for o in batched["outputs"]] == [
        o["token_ids"] for o in report["outputs"]
    ]


def test_stream_and_whole_show_the_same_text(
    model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = ["generate", "--model", str(model), "--prompt", "The quick", "--max-new-tokens", "24"]
    assert main(argv) == 0
    whole = capsys.readouterr()
    assert main([*argv, "--stream"]) == 0
    assert capsys.readouterr().out == whole.out
    assert "tokens/s" in whole.err


def test_stop_strings_cut_across_tokens(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    argv = ["generate", "--model", str(model), "--prompt", "The quick", "--json"]
    whole = _json(capsys, *argv, "--max-new-tokens", "60")["outputs"][0]
    loaded = mtd.load(model)
    assert loaded.tokenizer is not None
    # A stop string that starts inside one token and ends in another.
    ids = whole["token_ids"]
    pieces = [loaded.tokenizer.decode(ids[: i + 1]) for i in range(len(ids))]
    cut = next(i for i in range(5, 50) if len(pieces[i + 1]) > len(pieces[i]) > len(pieces[i - 1]))
    stop = whole["text"][len(pieces[cut]) - 1 : len(pieces[cut]) + 1]
    stopped = _json(capsys, *argv, "--max-new-tokens", "60", "--stop", "no such text", stop)
    output = stopped["outputs"][0]
    assert output["finish_reason"] == "stop"
    assert output["text"] == whole["text"][: whole["text"].index(stop)]
    assert len(output["token_ids"]) < len(ids)


def test_several_prompts(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    argv = ["generate", "--model", str(model), "--max-new-tokens", "4", "--json"]
    both = _json(capsys, *argv, "--prompt", "hello", "--prompt", "The quick")["outputs"]
    one = _json(capsys, *argv, "--prompt", "The quick")["outputs"]
    assert [output["id"] for output in both] == ["0", "1"]
    assert both[1]["token_ids"] == one[0]["token_ids"]


def test_chat_or_plain_text(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    argv = ["generate", "--model", str(model), "--prompt", "hello", "--json"]
    argv += ["--max-new-tokens", "2"]
    default = _json(capsys, *argv)["outputs"][0]["prompt_tokens"]
    chat = _json(capsys, *argv, "--chat")["outputs"][0]["prompt_tokens"]
    plain = _json(capsys, *argv, "--no-chat")["outputs"][0]["prompt_tokens"]
    assert default == chat == plain + 3  # the template's <|user|>, </s> and <|bot|>


def test_mesh_gives_the_same_tokens(
    model: Path, prompts: str, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = ["generate", "--model", str(model), "--prompts", prompts, "--json"]
    argv += ["--max-new-tokens", "9", "--batch-size", "3"]
    single = _json(capsys, *argv)
    for mesh in ("data=2,tensor=4", "fsdp=2,tensor=2", "data=8"):
        spread = _json(capsys, *argv, "--mesh", mesh)
        assert [o["token_ids"] for o in spread["outputs"]] == [
            o["token_ids"] for o in single["outputs"]
        ], mesh


def test_seeds_repeat(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    argv = ["generate", "--model", str(model), "--prompt", "hello", "--json"]
    argv += ["--max-new-tokens", "12", "--temperature", "1.5", "--top-p", "0.95", "--top-k", "40"]
    runs = [_json(capsys, *argv, "--seed", seed)["outputs"][0]["token_ids"] for seed in "112"]
    assert runs[0] == runs[1] != runs[2]


def test_bench_json(
    model: Path, prompts: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "bench.json"
    report = _json(
        capsys,
        *("bench", "--model", str(model), "--prompts", prompts, "--batch-sizes", "1,2"),
        *("--max-new-tokens", "8", "--repeats", "2", "--json", "--out", str(out)),
    )
    assert json.loads(out.read_text()) == report
    assert {"hardware", "versions", "bandwidth_gb_s", "rows"} <= report.keys()
    assert [(r["method"], r["batch_size"]) for r in report["rows"]] == [("ar", 1), ("ar", 2)]
    for row in report["rows"]:
        assert row["speedup_vs_ar"] == 1.0
        assert row["identical_to_ar"] is True
        assert row["tokens_per_second"] > 0
        assert 0 < row["roofline_share"] < 1


def test_inspect_and_round_trip(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    report = _json(capsys, "inspect", str(model), "--json")
    assert report["family"] == "llama"
    assert main(["convert", "to-hf", str(model), str(tmp_path / "hf")]) == 0
    assert main(["convert", "from-hf", str(tmp_path / "hf"), str(tmp_path / "again")]) == 0
    capsys.readouterr()
    again = _json(capsys, "inspect", str(tmp_path / "again"), "--json")
    assert again["fingerprint"] == report["fingerprint"]


def test_chat_reads_lines_and_keeps_the_conversation(
    model: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    lines = iter(["hello", "", "/reset", "again", "/exit", "never"])
    monkeypatch.setattr("builtins.input", lambda *_: next(lines))
    assert main(["chat", "--model", str(model), "--max-new-tokens", "6"]) == 0
    assert capsys.readouterr().out.count("6 tokens,") == 2
    assert next(lines) == "never"


def test_chat_says_once_that_acceptance_is_lossy(
    model: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing is asked: it is said before the first line is read."""
    monkeypatch.setattr("builtins.input", lambda *_: "/exit")
    argv = ["chat", "--model", str(model), "--method", "ngram", "--option", "drafts=2"]
    assert main(argv) == 0
    assert "LOSSY" not in capsys.readouterr().out
    assert main([*argv, "acceptance=typical", "--temperature", "0.7"]) == 0
    assert capsys.readouterr().out.count("LOSSY acceptance") == 1


def test_a_second_process_finds_all_programs_compiled(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MTD_CACHE_DIR", str(tmp_path))
    monkeypatch.setenv("JAX_DEBUG_LOG_MODULES", "jax._src.compiler")
    argv = ["generate", "--model", str(model), "--prompt", "hello", "--max-new-tokens", "4"]
    hits: list[int] = []
    kept: list[set[str]] = []
    for _ in range(2):
        done = run_program("-m", "mtd_jax.cli", *argv)
        assert done.returncode == 0, done.stderr[-3000:]
        hits.append(done.stderr.count("Persistent compilation cache hit"))
        kept.append({path.name for path in (tmp_path / "xla").glob("*-cache")})
    assert kept[0]
    assert kept[1] == kept[0]
    assert hits[1] >= len(kept[0]) > hits[0]
    assert "CACHE MISS" not in done.stderr


@pytest.mark.slow
def test_the_program_in_infer(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    argv = ["--prompt", "hello", "--max-new-tokens", "10"]
    done = run_program("infer/generate.py", "--model", model, *argv)
    assert done.returncode == 0, done.stderr[-3000:]
    assert main(["generate", "--model", str(model), *argv]) == 0
    assert done.stdout == capsys.readouterr().out
    source = (ROOT / "infer" / "generate.py").read_text()
    assert len(source.splitlines()) < 80


@pytest.mark.slow
@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (["--model", "no/such"], "no such file or directory: no/such"),
        (["--max-new-tokens", "0"], "at least 1"),
        (["--prompt", "hello " * 600], "leaves no room"),
        (["--temperature", "-1"], "temperature"),
        (["--sed", "1"], "did you mean '--seed'"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else None,
)
def test_the_program_in_infer_refuses_in_one_line(
    model: Path, changes: list[str], said: str
) -> None:
    argv = ["--model", str(model), "--prompt", "hello", *changes]
    done = run_program("infer/generate.py", *argv)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("generate.py: error: ")
    assert said in done.stderr
    assert done.stderr.count("\n") == 1
