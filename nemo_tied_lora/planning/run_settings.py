# SPDX-License-Identifier: Apache-2.0
"""What watches over a run: the settings, and how a run ends that one of its guards has stopped. Without torch."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from nemo_tied_lora.errors import ConfigError

__all__ = ["MOST_SKIPPED_IN_A_ROW", "NONFINITE_POLICIES", "GuardSettings", "run_folder", "survival_problems"]


NONFINITE_POLICIES = ("stop", "skip")


# A step that is skipped leaves every parameter as it was. Ten batches in a row without one finite gradient say that
# the parameters, and not the data, are at fault; more steps would only use the machine.
MOST_SKIPPED_IN_A_ROW = 10


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


def survival_problems(cfg: Mapping[str, Any]) -> list[str]:
    """What is wrong with `preflight`, `watchdog` and `preemption`, a line each."""
    problems = []
    if cfg.get("preflight") not in (True, False, "only"):
        problems.append(f"preflight={cfg.get('preflight')!r}: must be true, false or only")
    for key, (low, high) in _BOUNDS.items():
        section, _, name = key.partition(".")
        value = (cfg.get(section) or {}).get(name)
        kinds = int if section == "preemption" else (int, float)
        if isinstance(value, bool) or not isinstance(value, kinds) or not low <= value <= high:
            bound = f"of at least {low}" if high == math.inf else f"from {low} to {high}"
            problems.append(f"{key}={value!r}: must be a number {bound}")
    return problems


_BOUNDS = {
    "watchdog.start_s": (1, math.inf),
    "watchdog.timeout_s": (0, math.inf),
    "watchdog.stuck_s": (0, math.inf),
    "preemption.exit_code": (0, 255),
    "preemption.max_restarts": (0, math.inf),
}


def run_folder(cfg: Mapping[str, Any]) -> Path | None:
    """Where exp_manager will put the run; None where it makes a new folder each time (resume_if_exists=false)."""
    manager = cfg.get("exp_manager") or {}
    if manager.get("explicit_log_dir"):
        return Path(str(manager["explicit_log_dir"]))
    if not manager.get("resume_if_exists"):
        return None
    version = manager.get("version") or os.environ.get("NEMO_EXPM_VERSION") or ""
    return Path(str(manager.get("exp_dir") or "nemo_experiments")) / str(manager.get("name") or "default") / version
