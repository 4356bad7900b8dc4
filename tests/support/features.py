"""What every method does, found by doing it on a tiny model: the cells of docs/features.md.

    python -m tests.support.features

A feature works where its check passes, and is refused where the method says so in one line.
Whatever else happens is a failure.
"""

from __future__ import annotations

import dataclasses
import tempfile
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

import mtd_jax as mtd
from mtd_jax import Sampling, generate, methods
from mtd_jax.convert.conversions import save_native
from mtd_jax.decoding.heads import Heads
from mtd_jax.decoding.language_model import LanguageModel
from mtd_jax.errors import InputError
from mtd_jax.sharding import make_mesh
from tests.support import heads, tiny

PAGE = Path(__file__).parents[2] / "docs" / "features.md"
METHODS: dict[str, dict[str, Any]] = {
    "ar": {},
    "ngram": {"drafts": 3},
    "prompt_lookup": {"drafts": 3},
    "self_speculative": {"skip_attention": "1", "drafts": 3},
    "medusa": {"tree": "chain"},
    "hydra": {"tree": "chain"},
    "hidden_transfer": {"tree": "chain"},
    "cp": {"tree": "2x1"},  # no chain: on the likeliest paths
    "independent_heads": {"tree": "chain"},
    "dmtd": {"cycle": 3, "late": 2},
}
PROMPTS = [[3, 4, 5, 6, 3, 4, 5, 6, 3], [7] * 6, [50, 40, 50, 40, 50], [11]]
_BUDGET = 12
_COPIES = ("ngram", "prompt_lookup")
_TREE: dict[str, dict[str, Any]] = {"ngram": {"drafts": "auto", "branches": "2x1"}}


@cache
def _model(*windows: int | None) -> LanguageModel:
    changes = {"sliding_windows": windows} if windows else {}
    return tiny.language_model(tiny.config(eos_token_ids=(), **changes))


@cache
def _heads(name: str) -> Heads | None:
    if name not in methods.SPECS:
        return None
    return heads.fitted(_model(), heads.answers(_model(), PROMPTS[:2], _BUDGET), name, steps=30)


def _made(name: str, trained: Heads | None = None, changes: Mapping[str, Any] | None = None) -> Any:
    options = {**METHODS[name], **(changes or {})}
    return methods.make_method(name, options, trained or _heads(name))


def _ids(method: Any, model: LanguageModel | None = None, **options: Any) -> list[tuple[int, ...]]:
    """Batches of one size wherever it does not matter, so that programs are shared."""
    options = {"max_new_tokens": _BUDGET, "batch_size": len(PROMPTS)} | options
    done = generate(model or _model(), method, PROMPTS, **options)
    return [completion.token_ids for completion in done]


def _as_plain(method: Any, model: LanguageModel | None = None, **options: Any) -> None:
    """The tokens of plain decoding; of a lossy method, answers of whole length."""
    found = _ids(method, model, **options)
    assert all(len(tokens) == _BUDGET for tokens in found)
    assert not method.lossless or found == _ids(methods.autoregressive(), model, **options)


def greedy(name: str) -> None:
    """The tokens of plain decoding."""
    _as_plain(_made(name))


def sampling(name: str) -> None:
    """Draws that a seed repeats."""
    drawn = Sampling(temperature=0.9, top_p=0.95, seed=4)
    found = _ids(_made(name), sampling=drawn)
    assert found == _ids(_made(name), sampling=drawn)
    assert found != _ids(_made(name), sampling=dataclasses.replace(drawn, seed=5))


def penalties(name: str) -> None:
    """Plain decoding's, with the same penalties."""
    _as_plain(_made(name), sampling=Sampling(repetition_penalty=1.3))


def batches(name: str) -> None:
    """Rows of a ragged batch say what each says alone."""
    assert _ids(_made(name), batch_size=1) == _ids(_made(name))


def streaming(name: str) -> None:
    """Chunks are the answers in parts."""
    parts: list[tuple[int, ...]] = [()] * len(PROMPTS)
    options: Any = {"max_new_tokens": _BUDGET, "batch_size": len(PROMPTS)}
    for chunk in generate(_model(), _made(name), PROMPTS, stream=True, **options):
        parts[chunk.index] += chunk.token_ids
    assert parts == _ids(_made(name))


def trees(name: str) -> None:
    """Several guesses a place."""
    _as_plain(_made(name, changes=_TREE.get(name, {"tree": "2x1"})))


def copies(name: str) -> None:
    """Drafts from the text beside those of heads."""
    _as_plain(_made(name, changes={} if name in _COPIES else {"copy": True}))


def typical(name: str) -> None:
    """Lossy acceptance, marked so."""
    method = _made(name, changes={"acceptance": "typical"})
    assert not method.lossless
    _as_plain(method, sampling=Sampling(temperature=0.8, seed=1))


def windows(name: str) -> None:
    """Layers that see the newest tokens alone."""
    _as_plain(_made(name), _model(None, 5, 3))


def bfloat16(name: str) -> None:
    """Answers of whole length; products round, so tokens may differ."""

    def cast(weights: Any) -> Any:
        return jax.tree.map(lambda w: w.astype(jnp.bfloat16), weights)

    trained = _heads(name)
    if trained is not None:
        trained = dataclasses.replace(trained, weights=cast(trained.weights))
    model = dataclasses.replace(_model(), params=cast(_model().params))
    found = _ids(_made(name, trained), model)
    assert all(len(tokens) == _BUDGET for tokens in found)


def meshes(name: str) -> None:
    """Rows over two devices, weights over two others."""
    with tempfile.TemporaryDirectory() as place:
        save_native(_model(), Path(place) / "model")
        model = mtd.load(Path(place) / "model", mesh=make_mesh({"data": 2, "tensor": 2}))
        trained = _heads(name)
        if trained is not None:
            moved = dataclasses.replace(trained, base=model.fingerprint)
            trained = mtd.load_heads(heads.write(moved, Path(place) / "heads"), model)
        _as_plain(_made(name, trained), model)


FEATURES: dict[str, Callable[[str], None]] = {
    "greedy": greedy,
    "sampling": sampling,
    "penalties": penalties,
    "ragged batches": batches,
    "streaming": streaming,
    "trees": trees,
    "copies": copies,
    "typical acceptance": typical,
    "sliding windows": windows,
    "bfloat16": bfloat16,
    "meshes": meshes,
}


def cells(name: str) -> list[str]:
    """`yes` or `refused`, a cell a feature."""
    found = []
    for check in FEATURES.values():
        try:
            check(name)
            found.append("yes")
        except InputError as error:
            if "unknown option" not in str(error):
                raise
            found.append("refused")
    return found


def line(name: str) -> str:
    """A method's line of the table."""
    return f"| `{name}` | {' | '.join(cells(name))} |\n"


def main() -> None:
    """Writes the table anew."""
    text = PAGE.read_text(encoding="utf-8")
    begin, end = text.index("| method"), text.rindex("|\n") + 2
    head = ["method", *FEATURES]
    rows = [f"| {' | '.join(head)} |\n", f"| {' | '.join(['---'] * len(head))} |\n"]
    for name in METHODS:
        rows.append(line(name))
        print(rows[-1], end="", flush=True)
    PAGE.write_text(text[:begin] + "".join(rows) + text[end:], encoding="utf-8")


if __name__ == "__main__":
    jax.config.update("jax_num_cpu_devices", 4)
    main()
