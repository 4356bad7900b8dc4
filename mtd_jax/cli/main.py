"""`mtd`: parses the command line, runs a command, turns errors into exit codes."""

from __future__ import annotations

import os
import sys
import traceback
import warnings
from collections.abc import Sequence
from typing import Any, NoReturn

from jax.errors import JaxRuntimeError

from mtd_jax import __version__
from mtd_jax.backend import leave_libtpu_alone
from mtd_jax.cli import (
    aot,
    bench,
    chat,
    convert,
    distill,
    evaluate,
    fetch,
    generate,
    inspect,
    sweep,
    train,
    tune,
    verify,
)
from mtd_jax.cli.arguments import Parser
from mtd_jax.cli.termination import Terminated, terminable
from mtd_jax.errors import InputError, RunError, first_line

_DESCRIPTION = """\
Multi-token decoding of large language models in JAX.

First steps:
  mtd fetch smollm2-135m-instruct --out models/smollm2
  mtd generate --model models/smollm2 --prompt "Why is the sky blue?" --stream
"""
_INTERRUPTED, _TERMINATED = 130, 143
"""What shells show of a command that Ctrl-C or SIGTERM ended."""


def make_parser() -> Parser:
    """The whole command line."""
    parser = Parser(prog="mtd", description=_DESCRIPTION)
    parser.add_argument("--version", action="version", version=f"mtd-jax {__version__}")
    commands = parser.add_subparsers(
        title="commands", dest="command", required=True, metavar="COMMAND", parser_class=Parser
    )
    for command in (
        fetch,
        convert,
        inspect,
        generate,
        chat,
        distill,
        train,
        bench,
        verify,
        evaluate,
        tune,
        sweep,
        aot,
    ):
        command.add_parser(commands)
    return parser


def _show_warning(message: Warning | str, *_: Any, **__: Any) -> None:
    print(f"mtd: warning: {' '.join(str(message).split())}", file=sys.stderr)


@terminable()
def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command: 0 on success, 2 with one line on stderr for bad input, 1 on a failure."""
    warnings.showwarning = _show_warning
    try:
        leave_libtpu_alone()
        parser = make_parser()
        args = parser.parse_args(argv)
        code: int = args.run(args)
        sys.stdout.flush()
        return code
    except InputError as error:
        print(f"mtd: error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except RunError as error:
        print(f"mtd: {' '.join(str(error).split())}", file=sys.stderr)
        return 1
    except BrokenPipeError:
        # The reader of our output went away (`mtd ... | head`): nobody is left to tell.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except OSError as error:
        # A full disk, a name too long, missing rights: the user's to mend, not ours.
        print(f"mtd: error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("mtd: interrupted", file=sys.stderr)
        return _INTERRUPTED
    except Terminated:
        print("mtd: terminated", file=sys.stderr)
        return _TERMINATED
    except Exception as error:
        if _is_out_of_memory(error):
            print(f"mtd: out of memory: {first_line(error)}", file=sys.stderr)
        else:
            traceback.print_exc()
        return 1


def _is_out_of_memory(error: Exception) -> bool:
    on_device = isinstance(error, JaxRuntimeError) and "RESOURCE_EXHAUSTED" in str(error)
    return on_device or isinstance(error, MemoryError)


def script() -> NoReturn:
    """`main` as a process of its own."""
    code = main()
    if code in (_INTERRUPTED, _TERMINATED):
        # Threads of XLA that still compile would meet an interpreter that takes itself apart.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)
