"""Drafting methods from the command line: generate, bench, verify, tune, and what ties them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import jax
import pytest

from mtd_jax.cli.main import main
from mtd_jax.convert.method_files import MethodFile, read_method, write_method
from tests.support.checkpoints import hf_config, write_hf
from tests.support.command_line import ROOT, run_program

PROMPTS = [
    {"id": "a", "token_ids": [5, 6, 7] * 5, "category": "copy"},
    {"id": "b", "token_ids": [9, 8, 9, 8, 9], "category": "copy"},
    {"id": "c", "token_ids": [5, 6, 7, 1, 2], "category": "other"},
]
NEW_TOKENS = ("--max-new-tokens", "24")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    base = tmp_path_factory.mktemp("model")
    source = write_hf(base / "hf", hf_config(eos_token_id=None))
    assert main(["convert", "from-hf", str(source), str(base / "native")]) == 0
    return base / "native"


@pytest.fixture(scope="module")
def prompts(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("prompts") / "prompts.jsonl"
    path.write_text("\n".join(json.dumps(p) for p in PROMPTS))
    return str(path)


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MTD_CACHE_DIR", str(tmp_path / "cache"))


def _json(capsys: pytest.CaptureFixture[str], *argv: str, code: int = 0) -> Any:
    capsys.readouterr()
    assert main([*argv, "--json"]) == code
    return json.loads(capsys.readouterr().out)


def test_generate_reports_acceptance(
    model: Path, prompts: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = ["generate", "--model", str(model), "--prompts", prompts, *NEW_TOKENS]
    plain = _json(capsys, *argv)
    found = _json(capsys, *argv, "--method", "ngram", "--option", "drafts=3")
    assert [o["token_ids"] for o in found["outputs"]] == [o["token_ids"] for o in plain["outputs"]]
    assert found["lossless"] is True
    for metrics in (found["metrics"], found["outputs"][0]["metrics"]):
        assert len(metrics["acceptance_histogram"]) == 4
        assert metrics["num_spec_steps"] == sum(metrics["acceptance_histogram"])
        assert metrics["draft_acceptance_rate"] == pytest.approx(
            metrics["num_accepted_draft_tokens"] / metrics["num_draft_tokens"], abs=1e-4
        )
        assert metrics["bytes_read_per_token"] > 0
    assert plain["metrics"]["mean_acceptance_length"] is None
    assert plain["metrics"]["tokens_per_forward"] == 1.0
    # `auto` measures what steps cost, once.
    _json(capsys, *argv, "--method", "ngram")
    costs = (tmp_path / "cache" / "step-costs.json").read_text()
    assert all(cost > 0 for values in json.loads(costs).values() for cost in values)
    _json(capsys, *argv, "--method", "ngram", "--option", "longest=6")
    assert (tmp_path / "cache" / "step-costs.json").read_text() == costs


def test_bench_compares_methods_and_draws(
    model: Path, prompts: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, picture = tmp_path / "bench.json", tmp_path / "bench.png"
    labels = ["ar", "ngram:drafts=3", "ngram:branches=2", "prompt_lookup"]
    report = _json(
        capsys,
        *("bench", "--model", str(model), "--prompts", prompts, "--batch-sizes", "1,3"),
        *("--methods", ",".join(labels), "--repeats", "2", "--auto", *NEW_TOKENS),
        *("--out", str(out), "--plot", str(picture)),
    )
    assert json.loads(out.read_text()) == report
    assert picture.read_bytes().startswith(b"\x89PNG")
    rows = report["rows"]
    assert [(r["method"], r["batch_size"]) for r in rows] == [
        (label, size) for size in (1, 3) for label in labels
    ]
    for row in rows:
        assert row["identical_to_ar"] is True
        assert row["lossless"] is True
        assert sum(request["tokens"] for request in row["requests"]) == row["tokens"]
        assert len({request["id"] for request in row["requests"]}) == len(row["requests"]) > 1
        histograms = [request["acceptance_histogram"] for request in row["requests"]]
        assert sum(map(sum, histograms)) == row["num_spec_steps"]
        assert row["verdict"] in ("faster", "as fast", "slower")
        # With `auto` it is a matter of measured times whether anything is drafted.
        assert row["num_draft_tokens"] > 0 or row["method"] in ("ar", "prompt_lookup")
        assert (row["mean_acceptance_length"] is None) == (row["num_draft_tokens"] == 0)
    assert rows[0]["speedup_vs_ar"] == 1.0
    assert rows[0]["by_category"].keys() == {"copy", "other"}
    assert rows[0]["by_category"]["copy"]["prompts"] == 2
    assert rows[4]["by_category"] == {}  # a batch of both kinds
    assert [(c["method"], c["batch_size"]) for c in report["step_costs"]] == [
        ("prompt_lookup", 1),
        ("prompt_lookup", 3),
    ]


def test_bench_shows_its_noise(
    model: Path, prompts: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """The same program under two labels, on some of the prompts."""
    argv = ["bench", "--model", str(model), "--prompts", prompts, "--repeats", "2", *NEW_TOKENS]
    some = [*argv, "--methods", "ar,ar:again", "--category"]
    plain, again = _json(capsys, *some, "copy")["rows"]
    assert {request["id"] for request in plain["requests"]} == {"a", "b"}
    assert main([*some, "cope"]) == 2
    assert "'cope' (did you mean 'copy'?)" in capsys.readouterr().err
    assert (plain["method"], again["method"]) == ("ar", "ar:again")
    assert plain["speedup_vs_ar"] == 1.0
    assert again["speedup_vs_ar"] not in (None, 1.0)
    assert again["identical_to_ar"] is True
    assert again["compile_seconds"] == 0.0
    assert main([*argv, "--methods", "ar,ngram:again"]) == 2
    assert "KEY=VALUE" in capsys.readouterr().err
    assert main([*argv, "--methods", "ar,,"]) == 2
    assert "a comma with no method" in capsys.readouterr().err
    assert main([*argv, "--methods", "ngram", "--plot", "speed.png"]) == 2
    assert "--methods must name it too" in capsys.readouterr().err


def test_bench_says_plainly_what_is_slower(
    model: Path, prompts: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Drafting with nearly the whole model: nothing can be slower."""
    method = "self_speculative:skip_mlp=0:threshold=0:drafts=7"
    argv = ["bench", "--model", str(model), "--prompts", prompts, "--methods", f"ar,{method}"]
    assert main([*argv, "--repeats", "1", *NEW_TOKENS]) == 0
    assert "SLOWER than plain decoding" in capsys.readouterr().out


def test_bench_says_plainly_what_drafts_nothing(
    model: Path, prompts: str, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = ["bench", "--model", str(model), "--prompts", prompts, "--methods", "ngram:drafts=0"]
    assert main([*argv, "--repeats", "1", *NEW_TOKENS]) == 0
    assert "drafted nothing, so it was plain decoding" in capsys.readouterr().out


def test_verify_passes_and_fails(
    model: Path, prompts: str, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = ["verify", "--model", str(model), "--prompts", prompts, *NEW_TOKENS]
    report = _json(capsys, *argv, "--method", "ngram", "--batch-size", "2")
    assert (report["passed"], report["identical"], report["tokens"]) == (True, 3, 72)
    assert main([*argv, "--method", "prompt_lookup"]) == 0
    assert "3 of 3 prompts identical" in capsys.readouterr().out
    report = _json(capsys, *argv, "--method", "ngram", "--option", "drafts=2")
    assert 0 < report["num_accepted_draft_tokens"] <= report["num_draft_tokens"]
    assert main([*argv, "--method", "ngram", "--option", "drafts=0"]) == 0
    assert "compared plain decoding with itself" in capsys.readouterr().err
    assert main([*argv, "--method", "ngram", "--option", "drafts=0", "--json"]) == 0
    assert "compared plain decoding with itself" in capsys.readouterr().err


def test_verify_finds_what_parts_and_why(
    model: Path, prompts: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A verifier that accepts whatever is drafted."""
    from mtd_jax.decoding import verify

    real = verify.walk

    def gullible(tree: Any, drafts: Any, drawn: Any) -> Any:
        verdict = real(tree, drafts, drafts[:, [*range(1, tree.size), 0]])
        return verdict

    argv = ["verify", "--model", str(model), "--prompts", prompts, *NEW_TOKENS]
    with monkeypatch.context() as patch:
        patch.setattr(verify, "walk", gullible)
        jax.clear_caches()  # no program of an honest verifier, and none of this one for others
        try:
            report = _json(capsys, *argv, "--method", "ngram", "--option", "drafts=2", code=1)
        finally:
            jax.clear_caches()
    assert not report["passed"]
    worst = next(c for c in report["comparisons"] if not c["passed"])
    assert worst["position"] is not None
    assert worst["logit_gap"] > worst["allowed_gap"]


def test_tune_refuses_early_where_it_cannot_write(
    model: Path, prompts: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").touch()
    argv = ["tune", "self-speculative", "--model", str(model), "--prompts", prompts]
    assert main([*argv, "--out", str(tmp_path / "file" / "tuned")]) == 2
    assert "cannot write" in capsys.readouterr().err
    assert main([*argv, "--out", str(tmp_path / "file")]) == 2
    assert "cannot write" in capsys.readouterr().err


def test_tune_spares_what_is_for_another_method(
    model: Path, prompts: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    trained = MethodFile("medusa", {"count": 3}, "0" * 64)
    write_method(tmp_path, trained)
    argv = ["tune", "self-speculative", "--model", str(model), "--prompts", prompts]
    assert main([*argv, "--out", str(tmp_path)]) == 2
    assert "for method 'medusa': give another --out" in capsys.readouterr().err
    assert read_method(tmp_path) == trained


def test_tune_finds_the_same_set_every_time_and_goes_on(
    model: Path, prompts: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = ["tune", "self-speculative", "--model", str(model), "--prompts", prompts]
    argv += ["--max-new-tokens", "12"]
    whole = _json(capsys, *argv, "--evaluations", "10", "--out", str(tmp_path / "whole"))
    parts = _json(capsys, *argv, "--evaluations", "4", "--out", str(tmp_path / "parts"))
    # How long an answer its lines ask for does not matter.
    asked = tmp_path / "asked.jsonl"
    lines = [json.loads(line) for line in Path(prompts).read_text("utf-8").splitlines()]
    asked.write_text("\n".join(json.dumps(x | {"max_new_tokens": 2}) for x in lines), "utf-8")
    short = [str(asked) if word == prompts else word for word in argv]
    found = _json(capsys, *short, "--evaluations", "4", "--out", str(tmp_path / "asked"))
    assert found["options"] == parts["options"]
    again = _json(capsys, *argv, "--evaluations", "10", "--out", str(tmp_path / "parts"))
    assert again["options"] == whole["options"]
    file = read_method(tmp_path / "whole")
    assert file.method == "self_speculative"
    assert file.options["skip_attention"] or file.options["skip_mlp"]

    generate = ["generate", "--model", str(model), "--prompts", prompts, *NEW_TOKENS]
    plain = _json(capsys, *generate)
    tuned = ["--method", "self_speculative", "--heads", str(tmp_path / "whole")]
    found = _json(capsys, *generate, *tuned, "--option", "drafts=3")
    assert [o["token_ids"] for o in found["outputs"]] == [o["token_ids"] for o in plain["outputs"]]
    assert found["metrics"]["num_draft_tokens"] > 0


def test_settings_of_another_model_are_refused(
    model: Path, prompts: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    values = {"format": 1, "method": "self_speculative", "base": "else", "options": {}}
    (tmp_path / "method.json").write_text(json.dumps(values | {"options": {"skip_mlp": "0"}}))
    argv = ["generate", "--model", str(model), "--prompts", prompts, "--heads", str(tmp_path)]
    assert main([*argv, "--method", "self_speculative"]) == 2
    assert "another base model" in capsys.readouterr().err
    assert main([*argv, "--method", "ngram"]) == 2
    assert "is for method 'self_speculative'" in capsys.readouterr().err


@pytest.mark.parametrize("damage", ["", "[]", "{}", '{"format": 2}', '{"format": 1, "method": 3}'])
def test_damaged_settings_are_refused(
    damage: str, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "method.json").write_text(damage)
    argv = ["generate", "--model", str(model), "--prompt", "x", "--heads", str(tmp_path)]
    assert main([*argv, "--method", "self_speculative"]) == 2
    assert "method.json" in capsys.readouterr().err


@pytest.mark.slow
def test_the_program_in_infer(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The tokens of plain decoding, also where an end token is accepted inside a draft."""
    program = ROOT / "infer" / "speculative.py"
    assert len(program.read_text().splitlines()) <= 80
    ids = [5, 6, 7] * 5
    prompts = tmp_path / "one.jsonl"
    prompts.write_text(json.dumps({"token_ids": ids}))
    argv = ["generate", "--prompts", str(prompts), *NEW_TOKENS]
    answer = _json(capsys, *argv, "--model", str(model))["outputs"][0]["token_ids"]
    stop = next(t for t in answer[4:] if t not in ids)
    ending = tmp_path / "ending"
    shutil.copytree(model, ending)
    config = json.loads((ending / "config.json").read_text())
    config["model"]["eos_token_ids"] = [stop]
    (ending / "config.json").write_text(json.dumps(config))
    for path in (model, ending):
        expected = _json(capsys, *argv, "--model", str(path))["outputs"][0]["token_ids"]
        text = ",".join(map(str, ids))
        words = ("--model", path, "--token-ids", text, "--max-new-tokens", "24")
        done = run_program("infer/speculative.py", *words)
        assert done.returncode == 0, done.stderr
        assert done.stdout.startswith(f"{expected}\n[{len(expected)} tokens in")
    bad = run_program("infer/speculative.py", "--model", str(model), "--token-ids", "5,999999")
    assert (bad.returncode, bad.stderr.count("\n")) == (2, 1)


def test_answers_of_one_token_have_no_speed_up(
    model: Path, prompts: str, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = ["bench", "--model", str(model), "--prompts", prompts, "--methods", "ar,ngram:drafts=3"]
    argv += ["--repeats", "1", "--max-new-tokens", "1"]
    assert main(argv) == 0
    assert "SLOWER" not in capsys.readouterr().out
    rows = _json(capsys, *argv)["rows"]
    assert [r["speedup_vs_ar"] for r in rows] == [None, None]


@pytest.mark.parametrize("kept", ["[]", "{}", '{"x": [1]}', "nonsense"])
def test_a_broken_or_unwritable_cache_only_costs_a_measurement(
    kept: str, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompts = tmp_path / "p.jsonl"
    prompts.write_text('{"token_ids": [5, 6, 7]}')
    argv = ["generate", "--model", str(model), "--prompts", str(prompts), "--method", "ngram"]
    (tmp_path / "cache").mkdir(exist_ok=True)
    (tmp_path / "cache" / "step-costs.json").write_text(kept)
    assert main([*argv, "--max-new-tokens", "3"]) == 0
    monkeypatch.setenv("MTD_CACHE_DIR", "/proc/nothing")
    assert main([*argv, "--max-new-tokens", "3"]) == 0
