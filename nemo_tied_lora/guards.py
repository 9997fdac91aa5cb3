# SPDX-License-Identifier: Apache-2.0
"""What watches over a run: the settings, and how a run ends that one of its guards has stopped. Without torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from nemo_tied_lora.config import ConfigError

__all__ = ["MOST_SKIPPED_IN_A_ROW", "NONFINITE_POLICIES", "GuardSettings", "TrainingStopped"]

NONFINITE_POLICIES = ("stop", "skip")

# A step that is skipped leaves every parameter as it was. Ten batches in a row without one finite gradient say that
# the parameters, and not the data, are at fault; more steps would only use the machine.
MOST_SKIPPED_IN_A_ROW = 10


class TrainingStopped(RuntimeError):
    """A guard stopped the run. Raised on every rank, with the same message, for people to read."""


@dataclass(frozen=True, kw_only=True)
class GuardSettings:
    """The section `guards` of a run's configuration.

    Raises:
        ConfigError: every problem together.
    """

    tie_guard_every_n_steps: int = 200
    """Every so many steps, and before each save, ranks that hold the same tensor compare its bits. 0: never."""
    nonfinite_gradients: str = "stop"
    """Where a gradient is NaN or infinite. stop: end the run, all ranks; skip: leave the step out, and count it."""

    def __post_init__(self) -> None:
        problems = []
        steps, policy = self.tie_guard_every_n_steps, self.nonfinite_gradients
        if not isinstance(steps, int) or isinstance(steps, bool) or steps < 0:
            problems.append(
                f"guards.tie_guard_every_n_steps={steps!r}: must be a whole number of at least 0; 0 turns it off"
            )
        if policy not in NONFINITE_POLICIES:
            problems.append(f"guards.nonfinite_gradients={policy!r}: must be one of {', '.join(NONFINITE_POLICIES)}")
        if problems:
            raise ConfigError(problems)

    @classmethod
    def from_mapping(cls, section: Mapping[str, Any] | None) -> GuardSettings:
        """The section of a config; a missing section or a null stands for the default.

        Raises:
            ConfigError: an unknown key or a wrong value.
        """
        if section is not None and not isinstance(section, Mapping):
            raise ConfigError([f"guards={section!r}: must be a section with keys of its own"])
        known = [field.name for field in fields(cls)]
        given = {str(key): value for key, value in (section or {}).items() if value is not None}
        unknown = [key for key in given if key not in known]
        if unknown:
            raise ConfigError([f"guards.{key}: not a key of guards; they are {', '.join(known)}" for key in unknown])
        return cls(**given)
