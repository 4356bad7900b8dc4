"""The tokenizer that a GGUF file carries in its metadata."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from mtd_jax.errors import InputError, first_line, unknown_name
from mtd_jax.tokenizer import Tokenizer

_LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_QWEN2 = _LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}")
_NORMAL, _CONTROL, _USER_DEFINED, _BYTE = 1, 3, 4, 6  # values of tokenizer.ggml.token_type
_LONGEST_PIECE = 256  # characters; SentencePiece makes pieces of 16


def read_tokenizer(metadata: Mapping[str, Any]) -> Tokenizer | None:
    """The tokenizer, or None if the file has none.

    Raises:
      InputError: a kind of tokenizer that is not known here, or lists that do not fit together.
    """
    kind = metadata.get("tokenizer.ggml.model")
    if kind not in ("gpt2", "llama"):
        # The model loads, and takes and gives token ids.
        return None
    try:
        return _built(metadata, kind)
    except InputError:
        raise
    except Exception as error:  # names with spaces in a template, ids that are no ids
        raise InputError(
            f"the tokenizer of the GGUF file cannot be read: {first_line(error)}"
        ) from error


def _built(metadata: Mapping[str, Any], kind: str) -> Tokenizer:
    tokens = _texts(metadata, "tokenizer.ggml.tokens")
    types = metadata.get("tokenizer.ggml.token_type") or [_NORMAL] * len(tokens)
    if not isinstance(types, list):
        raise InputError("'tokenizer.ggml.token_type' in the GGUF file is no list")
    names = {
        f"{name}_token": tokens[i]
        for name, key in (("bos", "bos"), ("eos", "eos"), ("unk", "unknown"), ("pad", "padding"))
        if isinstance(i := metadata.get(f"tokenizer.ggml.{key}_token_id"), int)
        and 0 <= i < len(tokens)
    }
    pre = metadata.get("tokenizer.ggml.pre", "gpt-2")
    if kind == "llama":
        backend = _sentencepiece_bpe(metadata, tokens, types, names.get("unk_token"))
    else:
        backend = _byte_level_bpe(tokens, _texts(metadata, "tokenizer.ggml.merges"), str(pre))
    _add_special(backend, tokens, types)
    begins = kind == "llama" or pre in _LLAMA3_NAMES
    if "bos_token" in names and metadata.get("tokenizer.ggml.add_bos_token", begins):
        _add_bos(backend, names["bos_token"], int(metadata["tokenizer.ggml.bos_token_id"]))
    template = metadata.get("tokenizer.chat_template")

    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    from transformers import PreTrainedTokenizerFast

    inner = PreTrainedTokenizerFast(
        tokenizer_object=backend, clean_up_tokenization_spaces=False, **names
    )
    if isinstance(template, str):
        inner.chat_template = template
    return Tokenizer(inner)


def _byte_level_bpe(tokens: Sequence[str], merges: Sequence[str], pre: str) -> Any:
    from tokenizers import Tokenizer as Backend
    from tokenizers import decoders, models, normalizers, processors

    splits = _pre_tokenizers()
    if pre not in splits:
        raise unknown_name("GGUF pre-tokenizer", pre[:60], splits)
    pairs: list[tuple[str, str]] = []
    for merge in merges:
        left, _, right = merge.partition(" ")
        if not left or not right or " " in right:
            raise InputError("tokenizer.ggml.merges holds an entry that is not two tokens")
        pairs.append((left, right))
    try:
        model = models.BPE(
            vocab={token: i for i, token in enumerate(tokens)},
            merges=pairs,
            ignore_merges=pre in _LLAMA3_NAMES,
            fuse_unk=False,
        )
    except Exception as error:  # tokenizers raises bare Exception
        raise InputError(f"the GGUF tokenizer is inconsistent: {error}") from error
    backend = Backend(model)
    backend.pre_tokenizer = splits[pre]()
    backend.decoder = decoders.ByteLevel()
    backend.post_processor = processors.ByteLevel(trim_offsets=False)
    if pre in _QWEN2_NAMES:
        backend.normalizer = normalizers.NFC()
    return backend


def _sentencepiece_bpe(
    metadata: Mapping[str, Any], tokens: Sequence[str], types: Sequence[int], unknown: str | None
) -> Any:
    """Llama 2's kind: spaces are ▁, one stands before the text, unknown characters are bytes.

    SentencePiece joins the neighbours whose joint piece has the highest score. Here every way to
    cut a piece into two others is a merge, and the scores give the order.
    """
    from tokenizers import Tokenizer as Backend
    from tokenizers import decoders, models, normalizers

    scores = metadata.get("tokenizer.ggml.scores")
    if (
        not isinstance(scores, list)
        or not all(isinstance(score, float) for score in scores)
        or not len(scores) == len(types) == len(tokens)
    ):
        raise InputError("the GGUF file has no scores and types for all of its tokens")
    vocabulary = {token: i for i, token in enumerate(tokens)}
    # Control tokens and bytes are no pieces, though their names are made of letters.
    pieces = {t: s for t, s, kind in zip(tokens, scores, types, strict=True) if kind == _NORMAL}
    merges = [
        (-score, vocabulary[left], vocabulary[right], left, right)
        for piece, score in pieces.items()
        for at in range(1, min(len(piece), _LONGEST_PIECE))
        if (left := piece[:at]) in pieces and (right := piece[at:]) in pieces
    ]
    prefix = bool(metadata.get("tokenizer.ggml.add_space_prefix", True))
    backend = Backend(
        models.BPE(
            vocab=vocabulary,
            merges=[(left, right) for *_, left, right in sorted(merges)],
            unk_token=unknown,
            fuse_unk=True,
            byte_fallback=_BYTE in types,
        )
    )
    spaces = [normalizers.Prepend("▁")] if prefix else []
    backend.normalizer = normalizers.Sequence([*spaces, normalizers.Replace(" ", "▁")])
    joined = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    strip = [decoders.Strip(content=" ", left=1)] if prefix else []
    backend.decoder = decoders.Sequence([*joined, *strip])
    return backend


_LLAMA3_NAMES = ("llama-bpe", "llama-v3", "llama3")
_QWEN2_NAMES = ("qwen2", "deepseek-r1-qwen")


def _pre_tokenizers() -> dict[str, Callable[[], Any]]:
    """llama.cpp's names (`tokenizer.ggml.pre`) -> how text is split before merging."""
    from tokenizers import Regex, pre_tokenizers

    def by_regex(pattern: str) -> Callable[[], Any]:
        return lambda: pre_tokenizers.Sequence(
            [
                pre_tokenizers.Split(Regex(pattern), behavior="isolated"),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
            ]
        )

    def gpt2() -> Any:
        return pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)

    def smollm() -> Any:
        return pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), gpt2()])

    return {
        "gpt-2": gpt2,
        "smollm": smollm,
        **dict.fromkeys(_LLAMA3_NAMES, by_regex(_LLAMA3)),
        **dict.fromkeys(_QWEN2_NAMES, by_regex(_QWEN2)),
    }


def _add_special(backend: Any, tokens: Sequence[str], types: Sequence[int]) -> None:
    from tokenizers import AddedToken

    for special, kind in ((True, _CONTROL), (False, _USER_DEFINED)):
        added = [
            AddedToken(token, special=special, normalized=False)
            for token, its in zip(tokens, types, strict=False)
            if its == kind
        ]
        (backend.add_special_tokens if special else backend.add_tokens)(added)


def _add_bos(backend: Any, bos: str, token: int) -> None:
    from tokenizers import processors

    backend.post_processor = processors.TemplateProcessing(
        single=f"{bos} $A", pair=f"{bos} $A {bos} $B", special_tokens=[(bos, token)]
    )


def _texts(metadata: Mapping[str, Any], key: str) -> list[str]:
    value = metadata.get(key)
    if not isinstance(value, list) or not all(isinstance(v, str) for v in value):
        raise InputError(f"the GGUF file has no list of texts '{key}'")
    return value
