# SPDX-License-Identifier: Apache-2.0
"""The exceptions that a user meets, and how they are printed. Neither torch nor NeMo is imported."""

from __future__ import annotations

import sys
from collections.abc import Iterable

__all__ = ["ConfigError", "TrainingStopped", "report"]


class ConfigError(ValueError):
    """Every problem found in a configuration, one line each, each naming the field, the value and the fix."""

    def __init__(self, problems: Iterable[str]):
        self.problems = tuple(problems)
        super().__init__("\n".join(self.problems))


class TrainingStopped(RuntimeError):
    """A guard stopped the run. Raised on every rank, with the same message, for people to read."""


def report(command: str, error: ConfigError) -> int:
    """Prints every problem on stderr, a line each; returns the exit code."""
    print(f"tied-lora {command}: not possible:\n" + "\n".join(f"  {p}" for p in error.problems), file=sys.stderr)
    return 2
