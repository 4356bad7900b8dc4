"""Cycles from a checkpoint's config to decoded tokens, by the command line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

from mtd_jax import Sampling, generate, methods
from mtd_jax.cli.main import main
from mtd_jax.config import CycleConfig
from mtd_jax.convert.hf_config import config_from_hf, config_to_hf
from mtd_jax.convert.load import load
from mtd_jax.errors import InputError
from mtd_jax.training.objective import FineTuning
from tests.support.checkpoints import hf_config, hf_tensors, write_hf
from tests.support.command_line import assert_refused, run_commands, run_program
from tests.support.training import trained, write_config, write_model, write_texts

# A look-alike of the authors' checkpoint, which cannot be had here: their keys, a tiny model.
CYCLES = {
    "model_type": "dmtdqwen3",
    "architectures": ["DMTDQwen3ForCausalLM"],
    "num_encoding_layers": 0,
    "num_thinking_layers": 3,
    "num_decoding_layers": 1,
    "mtp_horizon": 3,
}
PROMPT: dict[str, Any] = {"id": "a", "token_ids": [5, 6, 7, 8]}


@pytest.fixture(scope="module")
def look_alike(tmp_path_factory: pytest.TempPathFactory) -> Path:
    base = tmp_path_factory.mktemp("dmtd")
    config = hf_config("qwen3", num_hidden_layers=4, eos_token_id=None)
    write_hf(base / "hf", {**config, **CYCLES}, hf_tensors(config))
    (base / "prompts.jsonl").write_text(json.dumps(PROMPT) + "\n", encoding="utf-8")
    assert main(["convert", "from-hf", str(base / "hf"), str(base / "native")]) == 0
    return base


def test_the_authors_config_comes_and_goes(look_alike: Path, tmp_path: Path) -> None:
    assert main(["convert", "to-hf", str(look_alike / "native"), str(tmp_path / "back")]) == 0
    before, after = (
        json.loads((place / "config.json").read_text())
        for place in (look_alike / "hf", tmp_path / "back")
    )
    for key, value in CYCLES.items():
        assert after[key] == value
    assert config_from_hf(after) == config_from_hf(before)
    tensors = [
        {k: v for f in place.glob("*.safetensors") for k, v in load_file(f).items()}
        for place in (look_alike / "hf", tmp_path / "back")
    ]
    assert tensors[0].keys() == tensors[1].keys()
    for name, values in tensors[0].items():
        np.testing.assert_array_equal(values, tensors[1][name])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_thinking_layers": None, "num_decoding_layers": None}, "neither"),
        ({"num_decoding_layers": 2}, "layers in groups"),
        ({"mtp_horizon": 99}, "cycle must be"),
        ({"mtp_anchor": "promt"}, "did you mean 'prompt'"),
        ({"dmtd_block_attention": "causal"}, "dmtd_block_attention"),
        ({"dmtd_history_mode": "shadow"}, "dmtd_history_mode"),
        ({"num_encoding_layers": 3, "num_thinking_layers": 0}, "no middle one"),
    ],
)
def test_what_is_no_dmtd_is_refused(changes: dict[str, Any], message: str) -> None:
    values = {**hf_config("qwen3", num_hidden_layers=4), **CYCLES, **changes}
    with pytest.raises(InputError, match=message):
        config_from_hf(values)


def test_the_command_line_decodes_in_the_checkpoints_cycles(look_alike: Path) -> None:
    model, prompts = str(look_alike / "native"), str(look_alike / "prompts.jsonl")
    rest = ["--model", model, "--prompts", prompts, "--max-new-tokens", "10"]
    decode, drafting = ["generate", *rest], "dmtd:cycle=2:lossless=true"
    cyclic = [*decode, "--method", "dmtd", "--json"]
    silent = ["--option", "anchor=prompt"]  # the authors' keys do not say it
    shorter = look_alike / "shorter.jsonl"
    shorter.write_text(json.dumps({**PROMPT, "cycle": 2}) + "\n", encoding="utf-8")
    own = ["--model", model, "--prompts", str(shorter), "--max-new-tokens", "6", "--json"]
    as_trained, unsaid, other, refused, plain, table, proof, speed, cycles, ours = run_commands(
        [
            [*cyclic, *silent],
            cyclic,
            [*cyclic, "--option", "cycle=2"],
            [*cyclic, "--option", "late=2"],
            [*decode, "--json"],
            ["inspect", model],
            ["verify", *rest, "--method", "dmtd", "--option", "lossless=true", "--json"],
            ["bench", *rest, "--methods", f"ar,dmtd,{drafting}", "--repeats", "1", "--json"],
            ["verify", *own, "--method", "dmtd", "--option", "lossless=true"],
            ["bench", *own, "--methods", "ar,dmtd", "--repeats", "1"],
        ]
    )
    (answer,) = json.loads(as_trained.out)["outputs"]
    fitting = methods.dmtd(3, 0, 1, "prompt")
    expected = generate(load(model), fitting, PROMPT["token_ids"], max_new_tokens=10)
    assert answer["token_ids"] == list(expected[0].token_ids)
    assert as_trained.err == ""
    assert unsaid.out.count("token_ids") == 1
    assert "does not say where its cycles start" in unsaid.err
    assert json.loads(as_trained.out)["lossless"] is False
    assert other.code == 0
    assert other.err.startswith("mtd: warning: these weights were trained for cycles of 3")
    assert len(other.err.splitlines()) == 1
    assert "trained with late = 1" in assert_refused(refused)
    assert json.loads(plain.out)["outputs"][0]["token_ids"] != answer["token_ids"]
    assert "cycle 3" in table.out
    assert json.loads(proof.out)["passed"] is True
    # A cycle of a prompt's own is for the method alone, not for what it is compared with.
    assert json.loads(cycles.out)["passed"] is True
    assert [row["tokens"] for row in json.loads(ours.out)["rows"]] == [6, 6]
    rows = {row["method"]: row for row in json.loads(speed.out)["rows"]}
    assert rows["dmtd"]["lossless"] is False
    # A pass through the late layers alone reads less than the whole model does.
    assert rows["dmtd"]["bytes_read_per_token"] < 0.8 * rows["ar"]["bytes_read_per_token"]
    assert rows["dmtd"]["mean_acceptance_length"] is None


def test_training_writes_a_model_that_decodes_in_its_cycles(tmp_path: Path) -> None:
    write_model(tmp_path, num_layers=3)
    write_texts(tmp_path)
    options = {"cycle": 3, "late": 1, "anchor": "sequence"}
    config = write_config(tmp_path, method="dmtd", optimizer__steps=3)
    text = config.read_text()
    lines = "".join(f"{key} = {json.dumps(value)}\n" for key, value in options.items())
    config.write_text(f"{text}\n[options]\n{lines}", encoding="utf-8")
    model = str(tmp_path / "run" / "model")
    decode = ["generate", "--model", model, "--method", "dmtd", "--prompt", "the fox"]
    decode += ["--max-new-tokens", "8"]
    look, run, decoded, refused, unknown = run_commands(
        [
            ["train", config, "--dry-run"],
            ["train", config],
            [*decode, "--json"],
            [*decode, "--option", "anchor=prompt"],
            ["train", config, "--set", "options.cicle=2"],
        ]
    )
    assert look.code == run.code == decoded.code == 0, run.err
    # Plain decoding has 1; how far above it this is hangs on where the answer ends.
    assert json.loads(decoded.out)["outputs"][0]["metrics"]["tokens_per_forward"] > 1
    assert decoded.err == ""
    assert "trained with anchor = sequence" in assert_refused(refused)
    assert "cycle" in assert_refused(unknown)


def test_losses_by_place_are_the_loss(tmp_path: Path) -> None:
    """Each place's mean, weighted by how often it occurs, is the whole; and it learns."""
    write_model(tmp_path, num_layers=3)
    write_texts(tmp_path)
    changes: dict[str, Any] = {"method": "dmtd", "options__cycle": 2, "options__late": 1}
    _, log = trained(tmp_path, optimizer__steps=8, **changes)
    line = log[-1]
    names = [f"held_out_loss_{name}" for name in ("1", "2", "plain")]
    assert all(np.isfinite(line[name]) for name in names)
    assert min(line[n] for n in names) < line["held_out_loss"] < max(line[n] for n in names)
    first = next(entry for entry in log if "held_out_loss" in entry)
    assert line["held_out_loss"] < first["held_out_loss"] - 0.05
    _, moved = trained(tmp_path, out=str(tmp_path / "moved"), options__random_phase=True, **changes)
    assert "loss_1" not in moved[0]
    assert np.isfinite(moved[-1]["held_out_loss_1"])
    assert moved[-1]["held_out_loss"] != line["held_out_loss"]
    # Before the first step nothing is moved: evaluation looks at what is decoded.
    start = next(entry for entry in moved if "held_out_loss" in entry)
    assert start["held_out_loss"] == pytest.approx(first["held_out_loss"], rel=1e-6)


def test_sampled_cycles_do_not_depend_on_the_batch(look_alike: Path) -> None:
    model = load(look_alike / "native")
    prompts = [[5, 6, 7, 8], [9, 8], [1, 2, 3, 4, 5, 6]]
    sampling = [Sampling(0.8, seed=i) for i in range(3)]
    method = methods.dmtd(cycle=3, anchor="prompt")
    together = generate(model, method, prompts, sampling=sampling, max_new_tokens=9, batch_size=3)
    for prompt, draw, completion in zip(prompts, sampling, together, strict=True):
        (alone,) = generate(model, method, prompt, sampling=draw, max_new_tokens=9)
        assert alone.token_ids == completion.token_ids


@pytest.mark.slow
def test_the_program_in_infer(look_alike: Path) -> None:
    """Its tokens are the method's."""
    model = str(look_alike / "native")
    ids = PROMPT["token_ids"]
    method = methods.dmtd(cycle=3, anchor="prompt")
    (expected,) = generate(load(model), method, ids, max_new_tokens=12)
    text = ",".join(map(str, ids))
    argv = ("infer/dmtd.py", "--model", model, "--max-new-tokens", "12", "--token-ids")
    done = run_program(*argv, text)
    assert done.stdout.splitlines()[0] == str(list(expected.token_ids)), done.stderr
    assert done.stdout.splitlines()[1].startswith("[12 tokens, 4 of them")
    for wrong in (["5,999999"], ["5", "--cycle", "0"], ["5", "--late", "9"]):
        bad = run_program(*argv, *wrong)
        assert bad.returncode == 2
        assert len([line for line in bad.stderr.splitlines() if "error" in line]) == 1


@pytest.mark.slow
def test_the_program_in_train(tmp_path: Path) -> None:
    """It learns what the loop learns, and what it writes decodes in cycles."""
    model = write_model(tmp_path, num_layers=3)
    texts = write_texts(tmp_path)
    argv = ["--model", str(model), "--data", str(texts), "--out", str(tmp_path / "tuned")]
    done = run_program("-m", "train.dmtd", *argv, "--late", "1", "--steps", "3")
    assert done.returncode == 0, done.stderr
    assert len([line for line in done.stdout.splitlines() if line.startswith("step")]) == 3
    assert load(tmp_path / "tuned").config.cycles == CycleConfig(0, 1, 2, "prompt")
    again = run_program("-m", "train.dmtd", *argv, "--late", "1", "--steps", "3")
    assert (again.returncode, again.stderr.count("\n")) == (2, 1)
    argv[-1] = str(tmp_path / "other")
    for slip in (("--steps", "0"), ("--batch-size", "0")):
        refused = run_program("-m", "train.dmtd", *argv, "--late", "1", *slip)
        assert (refused.returncode, refused.stderr.count("\n")) == (2, 1)


def test_eval_measures_what_is_kept(look_alike: Path, tmp_path: Path) -> None:
    """Means over all tokens, whatever the batch; cycles by place; a baseline beside them."""
    model = write_model(tmp_path, num_layers=3)
    texts = str(write_texts(tmp_path))
    measure: list[str | Path] = ["eval", "--model", model, "--text", texts, "--length", "64"]
    measure += ["--json"]
    cyclic = [*measure, "--method", "dmtd", "--option", "late=1", "--option", "cycle=3"]
    plain, batched, cycles, ones, table, bad_text, no_text, bad_length = run_commands(
        [
            measure,
            [*measure, "--batch-size", "7"],
            [*cyclic, "--baseline", model],
            [*measure, "--method", "dmtd", "--option", "late=1", "--option", "cycle=1"],
            [*[a for a in measure if a != "--json"], "--baseline", model],
            ["eval", "--model", model, "--text", tmp_path / "none.jsonl"],
            ["eval", "--model", model],
            ["eval", "--model", model, "--text", texts, "--length", "0"],
        ]
    )
    found = [json.loads(o.out) for o in (plain, batched, cycles, ones)]
    assert found[0]["tokens"] == found[2]["tokens"] > 100
    np.testing.assert_allclose(found[0]["loss"], found[1]["loss"], rtol=1e-5)
    np.testing.assert_allclose(found[0]["perplexity"], np.exp(found[0]["loss"]), rtol=1e-6)
    assert found[0]["by_place"] == {}
    assert set(found[2]["by_place"]) == {"1", "2", "3", "plain"}
    assert set(found[2]["baseline"]["by_place"]) == {"1", "2", "3", "plain"}
    assert found[2]["retention"]["perplexity_by_place"]["plain"] == pytest.approx(1.0, rel=1e-4)
    np.testing.assert_allclose(found[2]["baseline"]["loss"], found[0]["loss"], rtol=1e-5)
    kept = found[2]["retention"]
    assert kept["perplexity"] == pytest.approx(
        found[0]["perplexity"] / found[2]["perplexity"], rel=1e-5
    )
    assert set(found[3]["by_place"]) == {"1", "plain"}
    assert "not trained for cycles" in cycles.err
    assert "100.0%" in table.out
    for outcome in (bad_text, no_text, bad_length):
        assert_refused(outcome)


@pytest.mark.parametrize("kind", ["mtp_qwen3", "dmtd-qwen3", "qwen3"])
def test_what_authors_leave_out_has_their_defaults(kind: str) -> None:
    """No early layers, cycles of four; and the name comes back as it was."""
    values = {**hf_config("qwen3", num_hidden_layers=4), "model_type": kind}
    config = config_from_hf({**values, "num_decoding_layers": 1})
    assert config.cycles == CycleConfig(0, 1, 4, None, kind)
    back = config_to_hf(config)
    assert (back["model_type"], back["num_thinking_layers"]) == (kind, 3)
    assert config_from_hf(back) == config


def test_other_training_forgets_the_cycles(tmp_path: Path) -> None:
    """Weights that plain fine-tuning changed are not said to be for cycles any more."""
    write_model(tmp_path, num_layers=3)
    write_texts(tmp_path)
    options = {"options__cycle": 2, "options__late": 1}
    outcome, _ = trained(tmp_path, method="dmtd", optimizer__steps=1, **options)
    tuned = outcome.state.trainable
    assert tuned.config.cycles == CycleConfig(0, 1, 2, "prompt")
    assert FineTuning().split(tuned)[0].config.cycles is None
