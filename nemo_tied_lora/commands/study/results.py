# SPDX-License-Identifier: Apache-2.0
"""The results of a study: a folder with one small JSON file for each run, from which the page is made.

Numbers for each item are held as columns: a list, or one number if all are equal, or a string of 0 and 1, or
`{"of": j, "less": c}` for max(0, column j - c), as n-gram counts are of lengths.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nemo_tied_lora.commands.study.cells import LOSS, Cell, settings_key
from nemo_tied_lora.errors import ConfigError, Problems
from nemo_tied_lora.files import write_atomically

__all__ = ["FORMAT", "Result", "Results", "read_results", "write_result"]

FORMAT = 1
"""The version of the files' format."""
_KEYS = (
    "format",
    "settings",
    "data",
    "scores",
    "items",
    "statistics",
    "diverged",
    "trained_parameters",
    "seconds",
    "base",
)
_SECTIONS = ("settings", "data", "scores", "items", "statistics", "seconds")


@dataclass(frozen=True)
class Result:
    """The result of one run."""

    path: Path
    values: Mapping[str, Any]

    @property
    def key(self) -> str:
        """The key of the cell."""
        return settings_key(self.values["settings"])

    @property
    def diverged(self) -> bool:
        """Whether the training ended in numbers that are not finite. Such a run has no scores."""
        return bool(self.values["diverged"])

    @property
    def loss(self) -> float:
        """The answers' loss in nats per token; infinite if the run diverged."""
        return math.inf if self.diverged else float(self.values["scores"][LOSS])

    @property
    def seconds(self) -> float:
        """How long training and evaluation took together."""
        return float(sum(self.values["seconds"].values()))

    def statistics(self, metric: str) -> list[list[float]]:
        """The columns of a metric's statistics: k lists with a number for each item."""
        return _unpacked(self.values["statistics"][metric], self.values["items"]["count"])


class Results:
    """All results of a folder, by the key of their cell."""

    def __init__(self, found: Sequence[Result]) -> None:
        self.by_key = {result.key: result for result in found}

    def __contains__(self, cell: Cell) -> bool:
        return cell.key in self.by_key

    def of(self, cell: Cell) -> Result | None:
        """The result of a cell, or None."""
        return self.by_key.get(cell.key)

    def losses(self) -> dict[str, float]:
        """Key of a cell to the answers' loss in nats per token."""
        return {key: result.loss for key, result in self.by_key.items()}


def write_result(folder: Path, cell: Cell, values: Mapping[str, Any]) -> Path:
    """Writes a result, whole or not at all; `values` lacks what the cell knows.

    Args:
        values: `data` (checksums), `scores`, `items`, `statistics` (metric to columns), and the rest of the format.
    """
    statistics = {name: _packed(columns) for name, columns in values["statistics"].items()}
    whole = {"format": FORMAT, "settings": cell.settings, **values, "statistics": statistics}
    return write_atomically(folder / f"{cell.label}-{cell.key}.json", _text(whole).encode())


def read_results(folder: Path) -> Results:
    """Reads all results of a folder. A folder that does not exist has none.

    Raises:
        ConfigError: names each file that is not a result of this format, two results of one run, and results of one task
            that were made with different data or on different bases.
    """
    problems, found = Problems(), []
    for path in sorted(folder.glob("*.json")):
        values = problems.attempt(_read, path)
        if values is not None:
            found.append(Result(path, values))
    problems += _contradictions(found)
    problems.raise_if_any()
    return Results(found)


def _read(path: Path) -> dict[str, Any]:
    remedy = "remove it, or set results= to another folder"
    try:
        values = json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        raise ConfigError([f"{path}: cannot be read as a result of a study ({error}); {remedy}"]) from None
    if not isinstance(values, dict) or "format" not in values:
        raise ConfigError([f"{path}: is not a result of a study; {remedy}"])
    if values["format"] != FORMAT:
        raise ConfigError([f"{path}: has format {values['format']!r}, this version reads {FORMAT}; {remedy}"])
    missing = [key for key in _KEYS if key not in values]
    missing += [f"{key} as a section" for key in _SECTIONS if not isinstance(values.get(key, {}), dict)]
    if not missing:
        missing += [f"settings.{key}" for key in ("task", "base") if key not in values["settings"]]
        missing += [] if values["diverged"] or LOSS in values["scores"] else [f"scores.{LOSS}"]
    if missing:
        raise ConfigError([f"{path}: lacks {', '.join(missing)}; {remedy}"])
    return values


def _contradictions(found: Sequence[Result]) -> list[str]:
    """Two results of one run, and data or bases that differ although they have one name."""
    problems, first = [], dict[tuple[str, ...], Result]()
    for result in found:
        settings, values = result.values["settings"], result.values
        if (other := first.setdefault(("run", result.key), result)) is not result:
            problems.append(f"{result.path}: the same run as {other.path.name}; remove one of them")
        for name, checksum in values["data"].items():
            other = first.setdefault(("data", settings["task"], name), result)
            if other.values["data"][name] != checksum:
                problems.append(
                    f"{result.path}: {settings['task']}'s {name} data has checksum {checksum}, in {other.path.name} it is "
                    f"{other.values['data'][name]}; results of different data cannot be compared: remove one of them"
                )
        if values["base"] is None:  # no training, so nothing has recorded it
            continue
        other = first.setdefault(("base", settings["base"]), result)
        if other.values["base"] != values["base"]:
            problems.append(
                f"{result.path}: was made on a base with fingerprint {values['base']}, {other.path.name} on "
                f"{other.values['base']}; both say {settings['base']!r}: remove one of them"
            )
    return problems


def _packed(columns: Sequence[Sequence[float]]) -> list[Any]:
    """The shortest form of columns in JSON. Numbers that are not whole keep five significant digits."""
    numbers = [[_short(value) for value in column] for column in columns]
    return [_packed_column(numbers, index) for index in range(len(numbers))]


def _packed_column(columns: Sequence[list[float]], index: int) -> Any:
    column = columns[index]
    if len(set(column)) == 1:
        return column[0]
    if set(column) <= {0, 1}:
        return "".join(map(str, column))
    for other in range(index):
        for less in range(_MOST_LESS):
            if column == [max(0, value - less) for value in columns[other]]:
                return {"of": other, "less": less}
    return column


_MOST_LESS = 6
"""A metric's n-grams have at most 6 parts."""


def _short(value: float) -> float:
    return int(value) if float(value).is_integer() else float(f"{value:.5g}")


def _unpacked(packed: Sequence[Any], count: int) -> list[list[float]]:
    columns: list[list[float]] = []
    for column in packed:
        if isinstance(column, Mapping):
            columns.append([max(0.0, value - column["less"]) for value in columns[column["of"]]])
        else:
            columns.append(
                [float(value) for value in ([column] * count if isinstance(column, (int, float)) else column)]
            )
    return columns


def _text(values: Mapping[str, Any]) -> str:
    """JSON with one line for each value of the first two levels, so that a column is a line."""
    lines = []
    for key, value in values.items():
        if isinstance(value, Mapping) and value:
            inner = ",\n".join(f"    {json.dumps(name)}: {_line(one)}" for name, one in value.items())
            lines.append(f"  {json.dumps(key)}: {{\n{inner}\n  }}")
        else:
            lines.append(f"  {json.dumps(key)}: {_line(value)}")
    return "{\n" + ",\n".join(lines) + "\n}\n"


def _line(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"))
