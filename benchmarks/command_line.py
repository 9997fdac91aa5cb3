# SPDX-License-Identifier: Apache-2.0
"""Command-line options that the benchmarks share: counts, the model's sizes, and the files to write."""

from __future__ import annotations

import argparse
import dataclasses
import re
from pathlib import Path

from adapted_models import Sizes

__all__ = ["add_sizes", "between_marks", "count", "sizes_of", "write"]


def count(text: str) -> int:
    """The value of an option that must be at least 1."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{value}: must be at least 1")
    return value


def add_sizes(parser: argparse.ArgumentParser, defaults: Sizes) -> None:
    """Adds one option per size of the model."""
    for field in dataclasses.fields(Sizes):
        default = getattr(defaults, field.name)
        parser.add_argument(f"--{field.name}", type=count, default=default, metavar="N", help=field.metadata["help"])


def sizes_of(options: argparse.Namespace) -> Sizes:
    """The sizes from the options of `add_sizes`."""
    return Sizes(**{field.name: getattr(options, field.name) for field in dataclasses.fields(Sizes)})


def between_marks(page: str, begin: str, end: str, text: str) -> str:
    """A page with another text between two marks."""
    pattern = re.compile(f"{re.escape(begin)}.*?{re.escape(end)}", re.S)
    if not pattern.search(page):
        raise SystemExit(f"the page has no {begin} ... {end}")
    return pattern.sub(lambda _: f"{begin}\n\n{text}\n\n{end}", page)


def write(path: Path, text: str) -> None:
    """Writes a file, makes its folder if needed, and prints its path."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    print(f"wrote {path}")
