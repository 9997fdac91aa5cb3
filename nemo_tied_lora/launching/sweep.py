# SPDX-License-Identifier: Apache-2.0
"""Expands several values per key (`rank=2,8 preset=tl5,tl6`) to one run per combination, and lists the runs in an index file."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException

from nemo_tied_lora.errors import Problems
from nemo_tied_lora.launching.cluster_config import looks_secret
from nemo_tied_lora.planning.composing.override_lines import not_an_override

__all__ = ["Point", "expand_short_keys", "index_file", "points", "read_index", "split_sweep"]

# Short keys of `tied-lora launch` only, for the usual sweeps.
_SHORT = {"rank": "model.peft.tied_lora.rank"}


@dataclass(frozen=True)
class Point:
    """One run of a sweep."""

    name: str
    """The name of its folder: number and values."""
    overrides: tuple[str, ...]


def expand_short_keys(argument: str) -> str:
    """Returns `rank=8` as `model.peft.tied_lora.rank=8`, and other arguments unchanged."""
    key, sign, value = argument.partition("=")
    return f"{_SHORT[key]}={value}" if sign and key in _SHORT else argument


def split_sweep(arguments: Sequence[str]) -> tuple[list[str], list[list[str]]]:
    """Returns (overrides with one value, for each swept key its overrides with one value each).

    Raises:
        ConfigError: with every override that cannot be parsed or written to a file, and every secret.
    """
    fixed, swept, problems = [], [], Problems()
    for argument in arguments:
        try:
            parsed = OverridesParser.create().parse_override(argument)
            values = list(parsed.sweep_string_iterator()) if parsed.is_sweep_override() else []
        except (HydraException, NotImplementedError) as error:
            problems.append(not_an_override(argument, _first(error)))
            continue
        if looks_secret(parsed.key_or_group) and parsed.value() not in (None, "null"):
            problems.append(
                f"{parsed.key_or_group}: a secret, which would be written to a file; export it in the environment"
            )
        elif "\t" in argument or "\n" in argument:
            problems.append(f"{argument!r}: a tab or a line break cannot be written into a script's index")
        elif values:
            swept.append([f"{parsed.get_key_element()}={value}" for value in values])
        else:
            fixed.append(argument)
    problems.raise_if_any()
    return fixed, swept


def points(swept: Sequence[Sequence[str]]) -> list[Point]:
    """Returns every combination. The last key's values vary fastest."""
    combinations = list(itertools.product(*swept))
    digits = len(str(len(combinations) - 1))
    return [
        Point("_".join([f"{number:0{digits}d}", *map(_label, chosen)]), tuple(chosen))
        for number, chosen in enumerate(combinations)
    ]


def index_file(folder: str, runs: Sequence[Point]) -> str:
    """Returns the index: one line per run with its folder and its overrides, separated by tabs."""
    return "".join("\t".join([f"{folder}/{run.name}", *run.overrides]) + "\n" for run in runs)


def read_index(text: str) -> Iterator[tuple[str, list[str]]]:
    """Yields (folder, overrides) of each line of an index file."""
    for line in text.splitlines():
        folder, *overrides = line.split("\t")
        yield folder, overrides


def _label(override: str) -> str:
    key, _, value = override.lstrip("+~").partition("=")
    return f"{key.rpartition('.')[2]}-{re.sub(r'[^A-Za-z0-9.+-]+', '-', value).strip('-')}"


def _first(error: Exception) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__)
