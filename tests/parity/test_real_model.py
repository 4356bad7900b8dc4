"""SmolLM2-135M-Instruct against transformers, on the directory that `to-hf` writes of it."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path

import numpy as np
import pytest

import mtd_jax as mtd
from mtd_jax.convert import huggingface, native
from mtd_jax.convert.conversions import to_huggingface
from mtd_jax.convert.load import load_as_stored
from mtd_jax.sharding import make_mesh, parse_mesh
from mtd_jax.tokenizer import Tokenizer
from tests.support import hf
from tests.support.real import model_directory

pytestmark = [
    pytest.mark.slow,
    pytest.mark.optimized,
    pytest.mark.torch,
]

NEW_TOKENS = 128
GAP = 1e-4
"""Two tokens whose logits are closer than this are both the greatest, in float32."""
LOGITS = 1e-4
"""The largest difference of any logit between devices, in float32."""

_LEDGER = "\n".join(
    f"{day:02d}.{month:02d}. {what}, {price * 7 % 90 + 3}.{price % 100:02d} EUR"
    for price, (month, day, what) in enumerate(
        (m, d, w)
        for m in range(1, 7)
        for d, w in (
            (3, "bread"),
            (7, "tickets to Graz"),
            (15, "rent"),
            (22, "a lamp"),
            (28, "tea"),
        )
    )
)
PROMPTS = (
    "Why is the sky blue at noon and red in the evening?",
    "Write a Python function that returns the n-th Fibonacci number without recursion.",
    "A train leaves at 14:35 and arrives at 17:20. How long does it take? Show your steps.",
    "Translate into French: 'The library closes early on Fridays, so we should hurry.'",
    "List five uses of a paper clip, one on each line, numbered.",
    "Continue the story: The lighthouse keeper had not spoken to anyone for forty days when",
    "Erkläre in zwei Sätzen, was eine Primzahl ist. 🙂",
    'Fix this JSON and explain what was wrong: {"name": "Ada", "born": 1815,, "fields": [maths]}',
    "What is 7 * 8 + 12345 - 678? Then compare 0.1 + 0.2 with 0.3.",
    f"These are my expenses of half a year:\n\n{_LEDGER}\n\nWhich month was the most expensive, "
    "and what did I spend on tea? Answer briefly.",
)
TEXTS = (
    "",
    " ",
    "12345 3.14159 1,000,000 0x1F 2026-11-21",
    "a1b22c333 ٣٤٥ ²³ Ⅷ ½",
    "def f(x):\n    return x ** 2  # squares\n\n\tif not x:\r\n\t\tpass",
    "  leading, trailing   and      inner spaces   \n\n\n",
    "Žluťoučký kůň úpěl ďábelské ódy; ﬁne naïve façade e\u0301",
    "你好,世界。こんにちは 안녕하세요 नमस्ते שלום مرحبا",
    "👩‍👩‍👧 🇫🇷 🙂🏽 ☃️ 𝔘𝔫𝔦",
    "it's I'll they've WE'RE don't''s",
    "\u00a0\u200b\ufeff\u2028\x00\x7f",
    "<|im_start|>user\nhi<|im_end|> <|endoftext|>",
    "https://example.org/a?b=c&d=%20#e ... --- *** @@",
)


@cache
def _tokenizer() -> Tokenizer:
    return Tokenizer.load(model_directory())


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("real") / "hf"
    to_huggingface(model_directory(), directory)
    return directory


@pytest.mark.parametrize("mesh", ["", "data=2,tensor=4"], ids=["one device", "mesh"])
def test_greedy_answers_are_those_of_transformers(exported: Path, mesh: str) -> None:
    """128 tokens to each of ten prompts, by the chat template of either side.

    On a mesh, whose eight devices have two cores here, 32 tokens to the first eight. Every token is
    the greatest of what transformers says behind those before it, or less than 1e-4 under it: what
    its own greedy decoding would write, at a tenth of the time.
    """
    from transformers import AutoTokenizer

    theirs = AutoTokenizer.from_pretrained(exported)
    reference = hf.load_reference(exported)
    places = make_mesh(parse_mesh(mesh)) if mesh else None
    model = mtd.load(model_directory(), dtype="float32", mesh=places)
    assert model.tokenizer is not None
    prompts = []
    asked = PROMPTS[:8] if mesh else PROMPTS
    for text in asked:
        messages = [{"role": "user", "content": text}]
        ids = model.tokenizer.chat(messages)
        rendered = theirs.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
        assert ids == theirs.encode(rendered, add_special_tokens=False)
        direct = theirs.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
        assert ids == list(direct)
        prompts.append(ids)
    assert mesh or max(len(ids) for ids in prompts) > 500

    # On one device the short ones in a batch, the long one alone, as the command line does; text,
    # so that our template is used.
    new_tokens = 32 if mesh else NEW_TOKENS
    batches = (asked,) if mesh else (asked[:-1], asked[-1:])
    done = [
        completion
        for part in batches
        for completion in mtd.generate(
            model,
            mtd.methods.autoregressive(),
            list(part),
            max_new_tokens=new_tokens,
            batch_size=len(part),
            ignore_eos=True,
        )
    ]
    gaps = []
    for ids, completion in zip(prompts, done, strict=True):
        assert completion.prompt_tokens == len(ids)
        answer = completion.token_ids
        assert len(answer) == new_tokens
        read = np.array([[*ids, *answer[:-1]]])
        scores = hf.logits(reference, read)[0, len(ids) - 1 :]
        chosen = scores[np.arange(new_tokens), np.array(answer)]
        gaps.append(float((scores.max(axis=-1) - chosen).max()))
    print("largest gap of each answer:", gaps)  # shown by pytest -rP
    assert max(gaps) < GAP, gaps


def test_the_config_comes_back(exported: Path) -> None:
    assert huggingface.read_config(exported) == native.read_info(model_directory()).config


@pytest.mark.parametrize("text", TEXTS)
def test_ids_are_those_of_a_plain_bpe(text: str) -> None:
    """Digits apart, then bytes: put together from the vocabulary by `tokenizers` alone."""
    from tokenizers import AddedToken, models, pre_tokenizers
    from tokenizers import Tokenizer as Backend

    stored = json.loads((model_directory() / "tokenizer.json").read_text(encoding="utf-8"))
    pairs = (m.split(" ") if isinstance(m, str) else m for m in stored["model"]["merges"])
    merges = [(left, right) for left, right in pairs]
    backend = Backend(models.BPE(vocab=stored["model"]["vocab"], merges=merges))
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    backend.add_special_tokens(
        [AddedToken(t["content"], special=True, normalized=False) for t in stored["added_tokens"]]
    )
    assert _tokenizer().encode(text) == backend.encode(text).ids


def test_logits_on_a_mesh_are_those_of_one_device() -> None:
    """Two short prompts, each four times: a row for every device."""
    ids = [_tokenizer().chat([{"role": "user", "content": PROMPTS[i]}]) for i in (0, 2)]
    assert len(ids[0]) != len(ids[1])
    tokens = np.zeros((8, max(len(row) for row in ids)), np.int32)
    for number, row in enumerate(ids * 4):
        tokens[number, : len(row)] = row
    one = load_as_stored(model_directory(), dtype="float32")
    expected = np.asarray(mtd.logits(one, tokens[:2]))
    del one
    mesh = make_mesh(parse_mesh("data=2,fsdp=4"))
    model = mtd.load(model_directory(), dtype="float32", mesh=mesh)
    found = np.asarray(mtd.logits(model, tokens))
    for number, row in enumerate(ids * 4):
        difference = found[number, : len(row)] - expected[number % 2, : len(row)]
        assert np.abs(difference).max() <= LOGITS
