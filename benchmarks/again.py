"""Measures again, by the commands that results say they were made with, and makes the tables anew.

    python -m benchmarks.again --list
    python -m benchmarks.again cpu-ar cpu-methods

Nothing else should run on the machine meanwhile. A result is replaced when its command has ended
well; what one command needs beside the repository (a model, prompts) lies where the result says.
"""

from __future__ import annotations

import argparse
import json
import shlex
import subprocess
import sys
import tempfile
from pathlib import Path

from benchmarks import report

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
PROGRAMS = {"mtd": [sys.executable, "-m", "mtd_jax.cli"], "python": [sys.executable]}


def main() -> None:
    """Lists, or runs one command after another."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("names", nargs="*", metavar="NAME", help="results, without .json")
    parser.add_argument("--list", action="store_true", help="names, commits and commands, and end")
    args = parser.parse_args()
    known = {path.stem: _told(path) for path in sorted(RESULTS.glob("*.json"))}
    if args.list or not args.names:
        for name, told in known.items():
            print(f"{name:<22} {str(told.get('commit', '-'))[:9]:<10} {told.get('command', '-')}")
        return
    for name in args.names:
        if "--out" not in shlex.split(str(known.get(name, {}).get("command", ""))):
            sys.exit(f"again: no result '{name}' whose command says --out (see --list)")
    for name in args.names:
        measure_again(name, str(known[name]["command"]))
    report.main()


def measure_again(name: str, command: str) -> None:
    """Runs a command with its --out and --plot at their places in the repository."""
    program, *words = shlex.split(command)
    with tempfile.TemporaryDirectory() as scratch:
        result = Path(scratch) / f"{name}.json"
        words[words.index("--out") + 1] = str(result)
        picture = None
        if "--plot" in words:
            at = words.index("--plot") + 1
            picture, words[at] = Path(words[at]).name, str(Path(scratch) / "picture.png")
        done = subprocess.run([*PROGRAMS[program], *words], cwd=ROOT, check=False)
        if done.returncode:
            sys.exit(f"again: {name} ended with exit code {done.returncode}; it stays as it was")
        told = json.loads(result.read_text(encoding="utf-8")) | {"command": command}
        (RESULTS / f"{name}.json").write_text(json.dumps(told, indent=2) + "\n", encoding="utf-8")
        if picture is not None:
            (ROOT / "docs" / picture).write_bytes((Path(scratch) / "picture.png").read_bytes())


def _told(path: Path) -> dict[str, object]:
    found = json.loads(path.read_text(encoding="utf-8"))
    return found if isinstance(found, dict) else {}


if __name__ == "__main__":
    main()
