# SPDX-License-Identifier: Apache-2.0
"""Installs the package into NVIDIA's NeMo container, and changes nothing that the container brought.

    python install.py FOLDER

FOLDER holds the wheel and constraints.txt. The wheel is installed, and of what it asks for only what is missing, each
without its dependencies: resolving them would let pip replace NVIDIA's builds by those of the package index. The last
step proves that nothing was replaced. The Dockerfile runs this; the package is not there yet, so nothing of it is imported.
"""

from __future__ import annotations

import importlib.metadata
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

__all__ = ["install", "main"]

_THE_CONTAINERS_OWN = ("torch", "nemo-toolkit", "megatron-core", "transformer-engine", "apex")


def install(folder: Path) -> None:
    """Installs the wheel in `folder`; ends the process with a message where BASE is no NeMo container, or was changed."""
    before = _installed()
    absent = [name for name in _THE_CONTAINERS_OWN if name not in before]
    if absent:
        sys.exit(f"BASE has no {', '.join(absent)}: use NVIDIA's NeMo container, such as nvcr.io/nvidia/nemo:25.07")
    _pip_install(*map(str, folder.glob("*.whl")))
    while names := sorted(_missing("nemo_tied_lora", {"", "quickstart"}, set())):
        _pip_install("--constraint", str(folder / "constraints.txt"), *names)
    after = _installed()
    changed = [f"{name} {old} -> {after.get(name)}" for name, old in before.items() if after.get(name) != old]
    if changed:
        sys.exit(f"the installation changed what the container brought: {', '.join(changed)}")
    print("unchanged:", *(f"{name} {after[name]}" for name in _THE_CONTAINERS_OWN))
    print("added:", *(f"{name} {version}" for name, version in sorted(after.items()) if name not in before))


def _installed() -> dict[str, str]:
    """Name to version of every package."""
    importlib.invalidate_caches()
    found = ((one.metadata["Name"], one.version) for one in importlib.metadata.distributions())
    return {canonicalize_name(name): version for name, version in found if name}


def _missing(name: str, extras: set[str], seen: set[str]) -> Iterator[str]:
    """The requirements of a package that are not there, those of what is there included."""
    for one in map(Requirement, importlib.metadata.requires(name) or ()):
        key = canonicalize_name(one.name)
        if key in seen or (one.marker and not any(one.marker.evaluate({"extra": extra}) for extra in extras)):
            continue
        seen.add(key)
        if key not in _installed():
            yield key
        elif key not in _THE_CONTAINERS_OWN:
            yield from _missing(key, one.extras or {""}, seen)


def _pip_install(*what: str) -> None:
    # NVIDIA's own constraints name versions of packages that are not there; ours were tested.
    environment = {**os.environ, "PIP_CONSTRAINT": ""}
    command = (sys.executable, "-m", "pip", "install", "--no-cache-dir", "--no-deps", *what)
    subprocess.run(command, env=environment, check=True)


def main(arguments: list[str]) -> None:
    """The command."""
    (folder,) = arguments
    install(Path(folder))


if __name__ == "__main__":
    main(sys.argv[1:])
