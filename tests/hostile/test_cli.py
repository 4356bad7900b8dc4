"""Bad input: one line on stderr, exit code 2, nothing on stdout."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from mtd_jax.cli.main import main
from tests.support.checkpoints import hf_config, write_hf
from tests.support.command_line import one_line
from tests.support.tokenizers import byte_level


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = write_hf(tmp_path_factory.mktemp("model"), hf_config(vocab_size=400))
    byte_level().save(path)
    return str(path)


def _refused(capsys: pytest.CaptureFixture[str], *argv: str) -> str:
    assert main(argv) == 2
    return one_line(capsys)


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        ([], "COMMAND"),
        (["genrate"], "did you mean 'generate'"),
        (
            ["generate", "--modle", "x", "--prompt", "a"],
            "unknown flag '--modle' (did you mean '--model'?)",
        ),
        (["generate", "--modle=x"], "unknown flag '--modle' (did you mean '--model'?)"),
        (
            ["convert", "from-medusa", "a", "b", "--modle", "x"],
            "unknown flag '--modle' (did you mean '--model'?)",
        ),
        (["--verson"], "unknown flag '--verson' (did you mean '--version'?)"),
        (["generate", "--prompt", "-1", "--stop", "- a"], "are required: --model"),
        (["inspect", "{model}", "--", "--json"], "'--json'"),
        (["generate", "--model", "{model}"], "one of --prompt and --prompts"),
        (["generate", "--model", "{model}", "--prompt", "a", "--strem"], "did you mean '--stream'"),
        (["generate", "--model", "{model}", "--prompt", "a", "--prompts", "b"], "one of"),
        (["generate", "--model", "{model}", "--prompt", "a", "--stream", "--json"], "one of"),
        (["generate", "--model", "{model}", "--prompt", "a", "--method", "arr"], "method 'arr'"),
        (["generate", "--model", "{model}", "--prompt", "a", "--option", "k=1"], "option"),
        (["generate", "--model", "{model}", "--prompt", "a", "--option", "k"], "KEY=VALUE"),
        (
            ["generate", "--model", "{model}", "--prompt", "a", "--heads", "{model}"],
            "no method.json",
        ),
        (["generate", "--model", "{model}", "--prompt", "a", "--method", "ngran"], "'ngram'"),
        (
            ["generate", "--model", "{model}", "--prompt", "a", "--option", "drafts=2"],
            "option of method 'ar'",
        ),
        *(
            (["bench", "--model", "{model}", "--prompts", "x", "--methods", f"ar,{method}"], said)
            for method, said in {
                "ngram:draft=2": "did you mean 'drafts'",
                "ngram:drafts=two": "must be int or auto",
                "ngram:drafts=-1": "between 0 and 255",
                "ngram:drafts=99999": "between 0 and 255",
                "ngram:longest=0": "between 1 and 64",
                "ngram:branches=0": "1 or more",
                "ngram:branches=9x9x9": "at most 256",
                "ngram:branches=2:drafts=3": "not both",
                "ngram:acceptance=maybe": "exact or typical",
                "self_speculative": "mtd tune self-speculative",
                "self_speculative:skip_mlp=a": "layer numbers",
                "self_speculative:skip_mlp=9-3": "begins with its smaller number",
                "self_speculative:skip_mlp=1:threshold=nan": "between 0 and 1",
                "self_speculative:skip_mlp=1:drafts=0": "between 1 and 255",
            }.items()
        ),
        (["bench", "--model", "{model}", "--prompts", "x", "--plot", "no/x.png"], "cannot write"),
        (["bench", "--model", "{model}", "--prompts", "x", "--plot", "x.foo"], "cannot draw"),
        *(
            (
                [
                    *("generate", "--model", "{model}", "--prompts", "{tokens}"),
                    *("--method", "ngram", "--batch-size", size),
                ],
                "batch_size must be at least 1",
            )
            for size in ("0", "-1")
        ),
        (["verify", "--model", "{model}", "--prompts", "no.jsonl"], "no prompts file"),
        (["verify", "--model", "{model}", "--prompts", "x", "--batch-size", "0"], "batch-size"),
        (["tune", "self", "--model", "{model}"], "self-speculative"),
        (
            [
                *("tune", "self-speculative", "--model", "{model}", "--prompts", "x"),
                *("--out", "o", "--evaluations", "0"),
            ],
            "evaluations",
        ),
        (
            ["generate", "--model", "{model}", "--prompt", "a", "--presence-penalty", "nan"],
            "finite",
        ),
        (["generate", "--model", "{model}", "--prompt", "a", "--heads", "none"], "no heads at"),
        (["generate", "--model", "no/such/dir", "--prompt", "a"], "no model at no/such/dir"),
        (["generate", "--model", "{model}", "--prompts", "no.jsonl"], "no prompts file"),
        (["generate", "--model", "{model}", "--prompt", "", "--no-chat"], "empty"),
        (["generate", "--model", "{model}", "--prompt", "a " * 600, "--no-chat"], "context"),
        (
            ["generate", "--model", "{model}", "--prompt", "a", "--max-new-tokens", "0"],
            "at least 1",
        ),
        (["generate", "--model", "{model}", "--prompt", "a", "--max-new-tokens", "-1"], "at least"),
        (["generate", "--model", "{model}", "--prompt", "a", "--max-new-tokens", "x"], "x"),
        (
            ["generate", "--model", "{model}", "--prompt", "a", "--temperature", "nan"],
            "temperature",
        ),
        (["generate", "--model", "{model}", "--prompt", "a", "--temperature", "-1"], "temperature"),
        (
            ["generate", "--model", "{model}", "--prompt", "a", "--temperature", "inf"],
            "temperature",
        ),
        (["generate", "--model", "{model}", "--prompt", "a", "--top-p", "0"], "top_p"),
        (["generate", "--model", "{model}", "--prompt", "a", "--top-k", "-1"], "top_k"),
        (["generate", "--model", "{model}", "--prompt", "a", "--min-p", "2"], "min_p"),
        (["generate", "--model", "{model}", "--prompt", "a", "--seed", "-1"], "seed"),
        (["generate", "--model", "{model}", "--prompt", "a", "--stop", ""], "stop string"),
        (["generate", "--model", "{model}", "--prompt", "a", "--batch-size", "0"], "batch"),
        (["generate", "--model", "{model}", "--prompt", "a", "--mesh", "tensr=2"], "'tensor'"),
        (["generate", "--model", "{model}", "--prompt", "a", "--mesh", "tensor=0"], "positive"),
        (
            ["generate", "--model", "{model}", "--prompt", "a", "--mesh", "data=" + "1" * 5000],
            "data",
        ),
        (["generate", "--model", "{model}", "--prompt", "a", "--mesh", ""], "mesh axis"),
        (["generate", "--model", "{model}", "--prompt", "\udcff"], "surrogate"),
        (["generate", "--model", "a" * 5000, "--prompt", "a"], "too long"),
        (["inspect", "a" * 5000], "too long"),
        (["bench", "--model", "{model}", "--prompts", "x", "--out", "."], "cannot write"),
        (["bench", "--model", "{model}", "--prompts", "x", "--batch-sizes", "1" * 5000], "batch"),
        (["generate", "--model", "{model}", "--prompt", "a", "--mesh", "tensor=64"], "64 devices"),
        (["generate", "--model", "{model}", "--prompt", "a", "--dtype", "int8"], "int8"),
        (["bench", "--model", "{model}", "--prompts", "no.jsonl"], "no prompts file"),
        (["bench", "--model", "{model}", "--prompts", "no.jsonl", "--repeats", "0"], "repeats"),
        (["bench", "--model", "{model}", "--prompts", "x", "--methods", "ar,xx"], "method 'xx'"),
        (["bench", "--model", "{model}", "--prompts", "x", "--batch-sizes", "0"], "batch-sizes"),
        (["bench", "--model", "{model}", "--prompts", "x", "--methods", "ar,ar"], "ar twice"),
        (["bench", "--model", "{model}", "--prompts", "x", "--batch-sizes", "1,01"], "1 twice"),
        (["chat", "--model", "no/such"], "no model at"),
        # Refused before the model is looked for.
        (["chat", "--model", "no/such", "--max-new-tokens", "0"], "at least 1"),
        (["chat", "--model", "no/such", "--max-new-tokens", "-3"], "at least 1"),
        (["chat", "--model", "no/such", "--stop", ""], "stop string"),
        (["chat", "--model", "no/such", "--temperature", "nan"], "temperature"),
        (["inspect", "no/such"], "no/such"),
        (["convert", "from-hf", "no/such", "out"], "no/such"),
        (["convert", "sideways"], "from-hf"),
        (["fetch", "smollm3", "--out", "out"], "smollm2-135m-instruct"),
    ],
    ids=lambda value: " ".join(value)[:70] if isinstance(value, list) else None,
)
def test_refused_in_one_line(
    argv: list[str],
    said: str,
    model: str,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tokens.jsonl").write_text('{"token_ids": [5, 6]}')
    filled = [a.replace("{model}", model).replace("{tokens}", "tokens.jsonl") for a in argv]
    assert said in _refused(capsys, *filled)
    assert [path.name for path in tmp_path.iterdir()] == ["tokens.jsonl"]


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ('{"prompt": "a"', "line 2"),
        ("[1, 2]", "line 2: not a JSON object"),
        ('{"promt": "a"}', "did you mean 'prompt'"),
        ('{"prompt": 5}', "'prompt' must be text"),
        (
            '{"prompt": "a", "prompt": "b"}',
            "prompts.jsonl, line 2: the key 'prompt' is given twice",
        ),
        ('{"messages": [{"role": "user", "role": "x", "content": "a"}]}', "'role' is given twice"),
        ('{"prompt": "a", "top_p": 0.5}', "line 2: 'top_p' is no key of a prompt: sampling is set"),
        (
            '{"prompt": "a", "presence_penalty": 1}',
            "'presence_penalty' is no key of a prompt",
        ),
        (
            '{"prompt": "a", "temprature": 1}',
            "(did you mean 'temperature'?)",
        ),
        ('{"prompt": "a", "logit_bias": {}}', "line 2: 'logit_bias' is not offered"),
        ('{"prompt": "a", "n": 2}', "line 2: 'n' is not offered"),
        ('{"prompt": "a", "system": "b"}', "line 2: 'system' is not offered"),
        ('{"prompt": "a", "temperature": 1}', "by flags (--temperature)"),
        ('{"prompt": "a", "seed": -1}', "line 2: seed must be a whole number from 0 to 2^63 - 1"),
        ('{"prompt": "a", "seed": 9223372036854775808}', "line 2: seed must be a whole number"),
        ('{"prompt": "a", "seed": 1.5}', "line 2: 1.5 is not a whole number"),
        ('{"prompt": "a", "seed": true}', "line 2: True is not a whole number"),
        ('{"prompt": "a", "seeds": 1}', "(did you mean 'seed'?)"),
        ('{"prompt": "a", "id": "\\ud800"}', "line 2: a prompt holds half a surrogate pair"),
        ('{"prompt": "a", "stop": ["x"]}', "by flags (--stop)"),
        ('{"messages": "hi"}', "'messages' must be a list"),
        ('{"messages": [{"role": "user"}]}', "content"),
        ('{"messages": [{"role": "bad", "content": "x"}]}', "no such role"),
        ('{"prompt": "a", "token_ids": [1]}', "one of"),
        ('{"token_ids": [400]}', "outside 0..399"),
        ('{"token_ids": [-1]}', "outside 0..399"),
        ('{"token_ids": [1.5]}', "not a whole number"),
        ('{"token_ids": []}', "empty"),
        ('{"prompt": "a", "max_new_tokens": 0}', "at least 1"),
        ('{"prompt": "a", "max_new_tokens": "many"}', "not a whole number"),
        ("[" * 100_000, "line 2"),
        ('{"prompt": "a", "max_new_tokens": ' + "1" * 5000 + "}", "line 2"),
        ('{"prompt": "\\ud800"}', "surrogate"),
        ("\udcff", "utf-8"),
    ],
)
def test_bad_lines_in_a_prompts_file(
    line: str, said: str, model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "prompts.jsonl"
    first = json.dumps({"prompt": "fine", "max_new_tokens": 1})
    path.write_bytes(f"{first}\n{line}\n".encode("utf-8", "surrogateescape"))
    assert said in _refused(capsys, "generate", "--model", model, "--prompts", str(path))


def test_empty_prompts_file(model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "prompts.jsonl"
    path.write_text("\n\n")
    assert "no prompt" in _refused(capsys, "generate", "--model", model, "--prompts", str(path))


def test_results_that_cannot_be_written(
    model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text('{"token_ids": [1], "max_new_tokens": 2}\n')
    argv = ["bench", "--model", model, "--prompts", str(prompts), "--repeats", "1"]
    assert "cannot write" in _refused(capsys, *argv, "--out", str(tmp_path / "no" / "x.json"))
