# SPDX-License-Identifier: Apache-2.0
"""Errors that a user sees: how checks collect them, and how commands print them. Imports neither torch nor NeMo."""

from __future__ import annotations

import difflib
import math
import sys
from collections.abc import Callable, Collection, Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeGuard, TypeVar

__all__ = ["ConfigError", "Problems", "TrainingStopped", "did_you_mean", "is_number", "is_whole_number", "report"]

_Built = TypeVar("_Built")


class ConfigError(ValueError):
    """All problems of a configuration, one line each. A line names the field, its value and the remedy."""

    def __init__(self, problems: Iterable[str]):
        self.problems = tuple(problems)
        super().__init__("\n".join(self.problems))


class TrainingStopped(RuntimeError):
    """A guard stopped the run. Every rank raises it with the same message."""


class Problems(list[str]):
    """The problems that a check has found so far, one line each. A check collects them all, then raises them at once.

    Each method that takes a `key` and a `value` appends a line if the value is wrong.
    """

    def raise_if_any(self) -> None:
        """Raises a `ConfigError` with all problems, if there are any."""
        if self:
            raise ConfigError(self)

    def attempt(self, build: Callable[..., _Built], *args: Any, **kwargs: Any) -> _Built | None:
        """Calls `build`. If it raises a `ConfigError`, collects its problems and returns None."""
        try:
            return build(*args, **kwargs)
        except ConfigError as error:
            self.extend(error.problems)
            return None

    def build(self, build: Callable[..., _Built], *args: Any, **kwargs: Any) -> _Built:
        """Calls `build` and returns its result. Raises all problems, the collected ones and those of `build`."""
        result = self.attempt(build, *args, **kwargs)
        self.raise_if_any()
        assert result is not None
        return result

    def whole_number(self, key: str, value: object, least: int = 1, note: str = "") -> None:
        """The value must be a whole number of at least `least`. `note` follows the message."""
        if not is_whole_number(value, least):
            self.append(f"{key}={value!r}: must be a whole number of at least {least}{note}")

    def one_of(self, key: str, value: object, choices: Iterable[object]) -> None:
        """The value must be one of the choices."""
        choices = tuple(choices)
        if value not in choices:
            shown = ", ".join(_YAML.get(choice, str(choice)) for choice in choices)
            self.append(f"{key}={value!r}: unknown; choose one of {shown}")

    def flag(self, key: str, value: object) -> None:
        """The value must be a bool."""
        if value not in (True, False):
            self.append(f"{key}={value!r}: must be true or false")

    def file(self, key: str, path: object, remedy: str = "") -> None:
        """The path must be that of an existing file."""
        if path is None or not Path(str(path)).is_file():
            self.append(f"{key}={path}: no such file" + (remedy and f"; {remedy}"))

    def section(self, key: str, value: object) -> dict[str, Any]:
        """The value must be a mapping, or None, which means empty. Returns a copy; an empty dict if it is wrong."""
        if value is not None and not isinstance(value, Mapping):
            self.append(f"{key}={value!r}: must be a section of keys")
            return {}
        return dict(value or {})

    def known_keys(self, section: str, values: Mapping[str, Any], known: Collection[str]) -> dict[str, Any]:
        """Every key must be a known one. Returns the values that are."""
        self += [
            f"{section}.{k}: not a key of {section}; choose from {', '.join(known)}" for k in values if k not in known
        ]
        return {key: value for key, value in values.items() if key in known}


def is_number(value: object) -> TypeGuard[int | float]:
    """Whether the value is an int or a finite float. A bool is not."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def is_whole_number(value: object, least: int = 1) -> TypeGuard[int]:
    """Whether the value is an int of at least `least`. A bool is not."""
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


def report(command: str, error: ConfigError) -> int:
    """Prints every problem on stderr, one per line. Returns the exit code, 2."""
    text = f"tied-lora {command}: not possible:\n" + "\n".join(f"  {p}" for p in error.problems)
    with suppress(OSError):  # if nobody can read it, the code still says that the command was refused
        print(text, file=sys.stderr, flush=True)
    return 2


_YAML: dict[object, str] = {None: "null", True: "true", False: "false"}


def did_you_mean(word: object, choices: Iterable[str], cutoff: float = 0.6) -> str:
    """Returns " (did you mean CHOICE?)" for the choice most like the word; "" if none is.

    Args:
        cutoff: how alike they must be, from 0 to 1, as `difflib.get_close_matches` counts it.
    """
    close = difflib.get_close_matches(str(word), list(choices), n=1, cutoff=cutoff)
    return f" (did you mean {close[0]}?)" if close else ""
