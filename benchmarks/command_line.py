# SPDX-License-Identifier: Apache-2.0
"""What the benchmarks' command lines share: counts, the model's sizes, and the files that they write."""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path

from adapted_models import Sizes

__all__ = ["add_sizes", "count", "sizes_of", "write"]


def count(text: str) -> int:
    """An option's value that must be at least 1."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{value}: must be at least 1")
    return value


def add_sizes(parser: argparse.ArgumentParser, defaults: Sizes) -> None:
    """An option for each of the model's sizes."""
    for field in dataclasses.fields(Sizes):
        default = getattr(defaults, field.name)
        parser.add_argument(f"--{field.name}", type=count, default=default, metavar="N", help=field.metadata["help"])


def sizes_of(options: argparse.Namespace) -> Sizes:
    """The sizes that `add_sizes` asked for."""
    return Sizes(**{field.name: getattr(options, field.name) for field in dataclasses.fields(Sizes)})


def write(path: Path, text: str) -> None:
    """Writes a file and says so; its folder is made."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    print(f"wrote {path}")
