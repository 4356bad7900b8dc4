"""Compiles the configs of configs/pods/ for their pods and joins what was found.

    python benchmarks/pods.py --out benchmarks/results/pods.json --work /tmp/pods

Needs libtpu and no TPU; about two minutes a config on two cores. What lies in WORK already is not
compiled again, so that a run that was stopped goes on.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from importlib import metadata
from pathlib import Path

from mtd_jax.evaluation import environment

ROOT = Path(__file__).parents[1]
TOPOLOGIES = {"v5e-256": "v5e:16x16", "v5p-128": "v5p:4x4x4", "v6e-256": "v6e:16x16"}
"""By the end of a config's name. A v5p-128 has 128 cores: 64 chips."""


def main() -> None:
    """Runs `mtd compile` for every config and joins the results."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--decode", action="store_true", help="the decode loops too")
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    runs = []
    for config in sorted((ROOT / "configs" / "pods").glob("*.toml")):
        topology = next(name for end, name in TOPOLOGIES.items() if config.stem.endswith(end))
        found = args.work / f"{config.stem}.json"
        if not found.exists():
            command = [
                sys.executable,
                "-m",
                "mtd_jax.cli",
                "compile",
                str(config.relative_to(ROOT)),
            ]
            command += ["--topology", topology, "--out", str(found)]
            command += [] if args.decode else ["--train-only"]
            subprocess.run(command, cwd=ROOT, check=False)  # 1: something does not fit
        run = json.loads(found.read_text(encoding="utf-8"))
        run["command"] = f"mtd compile configs/pods/{config.name} --topology {topology}"
        run["command"] += "" if args.decode else " --train-only"
        runs.append(run)
    versions = environment.versions() | {"libtpu": metadata.version("libtpu")}
    result = {"versions": versions, **environment.provenance(), "runs": runs}
    args.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
