"""Arguments that several commands share, and a parser that fails in one line."""

from __future__ import annotations

import argparse
import itertools
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

from mtd_jax.errors import InputError, nearest, unknown_name

_INVALID_CHOICE = re.compile(r"invalid choice: '?(.*?)'? \(choose from (.*)\)")
_MISSING = "the following arguments are required"
# What argparse takes for a flag, not for a value: no number, no text with spaces.
_FLAG = re.compile(r"--?[^\W\d][\w-]*(=|$)")

Subparsers = Any
"""What `ArgumentParser.add_subparsers` returns; argparse does not export its type."""


class Parser(argparse.ArgumentParser):
    """An argparse parser whose errors are `InputError`s and name the nearest known flag."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        kwargs.setdefault("allow_abbrev", False)
        kwargs.setdefault("formatter_class", argparse.RawDescriptionHelpFormatter)
        super().__init__(*args, **kwargs)
        self._words: list[str] = []

    def error(self, message: str) -> NoReturn:
        """Raises what argparse would print below a usage text."""
        choice = _INVALID_CHOICE.search(message)
        if choice is not None:
            known = choice[2].replace("'", "").split(", ")
            message = str(unknown_name("choice", choice[1], known))
        if message.startswith(_MISSING):
            # A misspelt flag is why one is missing, and says more.
            words = itertools.takewhile(lambda word: word != "--", self._words)
            flags = [word.partition("=")[0] for word in words if _FLAG.match(word)]
            self._refuse([flag for flag in flags if flag not in self._option_string_actions])
        raise InputError(f"{message} (see {self.prog} --help)")

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """As argparse does it, but an argument that no flag took is an error here already.

        Only the command's own parser knows the flags to compare it with.
        """
        self._words = list(sys.argv[1:] if args is None else args)
        namespace, unknown = super().parse_known_args(self._words, namespace)
        self._refuse(unknown)
        return namespace, unknown

    def _refuse(self, unknown: Sequence[str]) -> None:
        if unknown:
            flag = unknown[0].partition("=")[0]
            what = "flag" if flag.startswith("-") else "argument"
            self.error(f"unknown {what} '{flag}'{nearest(flag, self._option_string_actions)}")


def add_model_arguments(parser: argparse.ArgumentParser) -> None:
    """--model, --dtype and --mesh."""
    group = parser.add_argument_group("model")
    group.add_argument(
        "--model",
        required=True,
        metavar="PATH",
        help="native checkpoint, HF directory or GGUF file",
    )
    group.add_argument(
        "--dtype",
        choices=["float32", "bfloat16", "float16"],
        help="of the weights while decoding (default: as stored; float32 on CPU)",
    )
    group.add_argument(
        "--mesh",
        metavar="data=N,fsdp=N,tensor=N",
        help="spread the model over devices; axes not named have size 1",
    )


def add_method_arguments(parser: argparse.ArgumentParser) -> None:
    """--method, --heads and --option."""
    group = parser.add_argument_group("decoding method")
    group.add_argument("--method", default="ar", help="how to decode (default: ar)")
    group.add_argument(
        "--heads", metavar="DIR", help="what was trained or tuned for the method and this model"
    )
    group.add_argument(
        "--option",
        action="extend",
        nargs="+",
        default=[],
        metavar="KEY=VALUE",
        help="a setting of the method; may be repeated",
    )


def add_sampling_arguments(parser: argparse.ArgumentParser) -> None:
    """Budget, sampling and stop strings."""
    group = parser.add_argument_group("sampling")
    group.add_argument("--max-new-tokens", type=int, metavar="N", help="budget (default: 256)")
    group.add_argument(
        "--temperature", type=float, default=0.0, metavar="T", help="0 is greedy (default)"
    )
    group.add_argument("--top-p", type=float, default=1.0, metavar="P", help="nucleus (default: 1)")
    group.add_argument("--top-k", type=int, default=0, metavar="K", help="0 keeps all (default)")
    group.add_argument(
        "--min-p", type=float, default=0.0, metavar="P", help="share of the best (default: 0)"
    )
    group.add_argument(
        "--repetition-penalty", type=float, default=1.0, metavar="X", help="1 is none (default)"
    )
    group.add_argument(
        "--presence-penalty", type=float, default=0.0, metavar="X", help="0 is none (default)"
    )
    group.add_argument(
        "--frequency-penalty", type=float, default=0.0, metavar="X", help="0 is none (default)"
    )
    group.add_argument("--seed", type=int, default=0, metavar="S", help="of the draws (default: 0)")
    group.add_argument(
        "--stop",
        action="extend",
        nargs="+",
        default=[],
        metavar="TEXT",
        help="end the answer before this text; may be repeated",
    )


def parse_options(pairs: Sequence[str]) -> dict[str, str]:
    """`--option` values as a mapping.

    Raises:
      InputError: something that is not KEY=VALUE, or a key given twice.
    """
    options: dict[str, str] = {}
    for pair in pairs:
        key, equals, value = pair.partition("=")
        if not equals or not key:
            raise InputError(f"--option takes KEY=VALUE, got '{pair}'")
        if key in options:
            raise InputError(f"--option {key} is given twice")
        options[key] = value
    return options


def check_positive(args: argparse.Namespace, *names: str) -> None:
    """Raises InputError for a number below 1; None is none."""
    for name in names:
        value = getattr(args, name)
        if value is not None and value < 1:
            raise InputError(f"--{name.replace('_', '-')} must be at least 1, got {value}")


def existing_path(text: str, what: str) -> Path:
    """The path, if something is there.

    Raises:
      InputError: nothing is.
    """
    path = Path(text)
    if not path.exists():
        raise InputError(f"no {what} at {text}")
    return path
