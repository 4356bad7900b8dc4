"""What a command does before it decodes: cache for compiled programs, model, method, sampling."""

from __future__ import annotations

import argparse
import dataclasses
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax

from mtd_jax import methods, sharding
from mtd_jax.cli.arguments import check_positive, existing_path, parse_options
from mtd_jax.convert.heads import load_heads, shipped_heads
from mtd_jax.convert.load import load
from mtd_jax.convert.method_files import MethodFile, read_method
from mtd_jax.decoding.language_model import LanguageModel
from mtd_jax.decoding.method import Method
from mtd_jax.decoding.requests import AnyPrompt, as_prompt, encode
from mtd_jax.decoding.sampling import Sampling
from mtd_jax.decoding.stopping import StopMatcher
from mtd_jax.directories import cache_directory
from mtd_jax.errors import InputError
from mtd_jax.evaluation import step_cost


def use_compilation_cache() -> None:
    """Keeps compiled programs on disk, so that only the first run of a shape compiles."""
    jax.config.update("jax_compilation_cache_dir", str(cache_directory() / "xla"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)


def open_model(args: argparse.Namespace, path: str | None = None) -> LanguageModel:
    """The model of --model (or another one), --dtype and --mesh."""
    use_compilation_cache()
    where = existing_path(args.model if path is None else path, "model")
    mesh = sharding.make_mesh(sharding.parse_mesh(args.mesh)) if args.mesh is not None else None
    return load(where, dtype=args.dtype, mesh=mesh)


@dataclasses.dataclass(frozen=True)
class Choice:
    """A method as it was asked for; checked, but not yet fitted to a model and a batch size."""

    label: str
    name: str
    options: Mapping[str, Any]
    """Those that were asked for, over those of the heads."""
    file: MethodFile | None = None
    heads: Path | None = None

    def made(self, model: LanguageModel) -> Method:
        """The method with its heads: those that were named, or those that come with the package.

        Raises:
          InputError: heads for another model, or none where there must be some.
        """
        if self.file is not None and self.heads is not None:
            self.file.check_base(model.fingerprint, self.heads)
        if self.name not in methods.SPECS:
            trained = methods.trained_options(self.name, model.config)
            return methods.make_method(self.name, {**trained, **self.options})
        directory = self.heads or shipped_heads(self.name, model)
        if directory is None:
            raise InputError(
                f"no trained heads of '{self.name}' come with mtd for this model: train them with "
                f"`mtd train` and a config like configs/{self.name}/smollm2-135m.toml, then give "
                "the directory as --heads"
            )
        return methods.make_method(self.name, self.options, load_heads(directory, model))

    def fitted(
        self, model: LanguageModel, *, batch_size: int, prompt_tokens: int, fresh: bool = False
    ) -> Method:
        """The method ready to run: its heads are for this model, its costs are measured.

        Args:
          fresh: measure costs although they are known from an earlier run; later ones use them.
        """
        fitted: Method = step_cost.calibrated(
            model,
            self.made(model),
            batch_size=batch_size,
            prompt_tokens=prompt_tokens,
            cache=cache_directory() / "step-costs.json",
            fresh=fresh,
        )
        return fitted


def choose_method(name: str, heads: str | None, options: Mapping[str, str], label: str) -> Choice:
    """The method of that name with the options of its heads and, over them, `options`.

    What needs no weights is checked now, before any are loaded.
    """
    file = directory = None
    known: Mapping[str, Any] = options
    if heads is not None:
        directory = existing_path(heads, "heads")
        file = read_method(directory)
        if name in methods.METHODS and file.method != name:
            raise InputError(f"{heads} is for method '{file.method}', not '{name}'")
        known = {**file.options, **options}
    typed = methods.typed_options(name, known)
    if name not in methods.SPECS:
        methods.make_method(name, typed)
        return Choice(label, name, typed, file, directory)
    # Those of the heads come with them; another value of what they were trained with is refused.
    return Choice(label, name, methods.typed_options(name, options), file, directory)


def open_method(args: argparse.Namespace) -> Choice:
    """The method of --method, --heads and --option."""
    options = parse_options(args.option)
    return choose_method(args.method, args.heads, options, args.method)


def typical_length(
    model: LanguageModel, prompts: Sequence[AnyPrompt], chat: bool | None = None
) -> int:
    """The median of the prompts' lengths in tokens: where costs are measured."""
    known = [as_prompt(p, i) for i, p in enumerate(prompts)]
    lengths = [
        len(encode(p, model.config, model.tokenizer, max_new_tokens=1, chat=chat).token_ids)
        for p in known
    ]
    return int(statistics.median_high(lengths))


def sampling_of(args: argparse.Namespace) -> Sampling:
    """The sampling flags, checked with those beside them: budget and stop strings."""
    check_positive(args, "max_new_tokens")
    StopMatcher(args.stop)
    names = [field.name for field in dataclasses.fields(Sampling)]
    return Sampling(**{name: getattr(args, name) for name in names})
