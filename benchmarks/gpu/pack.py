# SPDX-License-Identifier: Apache-2.0
"""Packs what a bare machine with torch and a GPU, and without a network, needs to test and measure this project.

    python benchmarks/gpu/pack.py --output gpu-pack           # here: a network, and an environment of `make setup-mcore016`
    python gpu-pack/benchmarks/gpu/run.py --output results    # there

The folder holds wheels (this package, megatron-core, and what both need except torch) and the tests and benchmarks.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import shutil
import subprocess
import sys
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

__all__ = ["main", "needed"]

ROOT = Path(__file__).resolve().parents[2]
ROOTS = ("megatron-core", "psutil", "bitsandbytes", "filelock", "pytest", "pytest-timeout", "pytest-xdist")
_PARTS = (
    "tests",
    "benchmarks",
    "configs",
    "docs",
    "nemo_tied_lora",
    "launch",
    "pyproject.toml",
    "constraints.txt",
    "README.md",
    "LICENSE",
)


def needed(leave_out: frozenset[str]) -> dict[str, str]:
    """Name to version of each package that this environment has and the other machine needs.

    Args:
        leave_out: these, and what only they need, are not followed.
    """
    found: dict[str, str] = {}
    project = importlib.metadata.requires("nemo_tied_lora") or []
    to_visit = [*ROOTS, *(one.name for one in map(Requirement, project) if one.marker is None)]
    while to_visit:
        name = canonicalize_name(to_visit.pop())
        if name in found or name in leave_out:
            continue
        found[name] = importlib.metadata.version(name)
        for line in importlib.metadata.requires(name) or []:
            requirement = Requirement(line)
            if requirement.marker is None or requirement.marker.evaluate({"extra": ""}):
                to_visit.append(requirement.name)
    return dict(sorted(found.items()))


def main() -> None:
    """The command line; `--help` describes it."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--output", type=Path, required=True, metavar="FOLDER", help="a new folder")
    parser.add_argument(
        "--without",
        nargs="*",
        default=[],
        metavar="NAME",
        help="packages that the machine has, such as numpy, to make the folder smaller",
    )
    options = parser.parse_args()
    if options.output.exists():
        parser.error(f"--output {options.output}: exists already; name a new folder")
    wheels = options.output / "wheels"
    wheels.mkdir(parents=True)
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet"]
    packages = needed(frozenset({"torch", *map(canonicalize_name, options.without)}))
    pinned = [f"{name}=={version}" for name, version in packages.items()]
    for part in _PARTS:
        copy = shutil.copytree if (ROOT / part).is_dir() else shutil.copyfile
        copy(ROOT / part, options.output / part)
    print(f"gathering {len(pinned) + 1} wheels", flush=True)
    # `pip wheel`, not `pip download`: some packages have no wheel in the index. This package's is built from the copy,
    # because building leaves folders behind.
    own = str(options.output.resolve())
    subprocess.run([*pip, "wheel", "--no-deps", "--wheel-dir", str(wheels), *pinned, own], check=True)
    for made in (options.output / "build", *options.output.glob("*.egg-info"), *options.output.rglob("__pycache__")):
        shutil.rmtree(made, ignore_errors=True)
    size = sum(path.stat().st_size for path in options.output.rglob("*") if path.is_file())
    print(f"{options.output}: {len(list(wheels.iterdir()))} wheels, {size / 1e6:.0f} MB in all")


if __name__ == "__main__":
    main()
