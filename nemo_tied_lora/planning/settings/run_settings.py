# SPDX-License-Identifier: Apache-2.0
"""Settings of the guards, the watchdog and restarts, and the folder of a run. Imports no torch."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from nemo_tied_lora.errors import Problems

__all__ = [
    "MOST_SKIPPED_IN_A_ROW",
    "NONFINITE_POLICIES",
    "GuardSettings",
    "checkpoint_folder",
    "run_folder",
    "survival_problems",
]


NONFINITE_POLICIES = ("stop", "skip")


# A skipped step changes no parameter. After ten non-finite batches in a row the parameters are at fault, not the data,
# and more steps would only waste the machine.
MOST_SKIPPED_IN_A_ROW = 10


@dataclass(frozen=True, kw_only=True)
class GuardSettings:
    """The section `guards` of a run's configuration.

    Raises:
        ConfigError: with all problems.
    """

    tie_guard_every_n_steps: int = 200
    """Ranks that hold the same tensor compare its bits after every so many steps and before each save. 0: never."""
    nonfinite_gradients: str = "stop"
    """What to do if a gradient is NaN or infinite. stop: end the run on all ranks; skip: skip the step and count it."""

    def __post_init__(self) -> None:
        problems = Problems()
        problems.whole_number("guards.tie_guard_every_n_steps", self.tie_guard_every_n_steps, 0, "; 0 turns it off")
        problems.one_of("guards.nonfinite_gradients", self.nonfinite_gradients, NONFINITE_POLICIES)
        problems.raise_if_any()

    @classmethod
    def from_mapping(cls, section: Mapping[str, Any] | None) -> GuardSettings:
        """Reads the section. A missing section, or a null value, means the default.

        Raises:
            ConfigError: an unknown key or a wrong value.
        """
        problems = Problems()
        given = {key: value for key, value in problems.section("guards", section).items() if value is not None}
        return problems.build(cls, **problems.known_keys("guards", given, [field.name for field in fields(cls)]))


def survival_problems(cfg: Mapping[str, Any]) -> Problems:
    """Checks `preflight`, `watchdog` and `preemption`."""
    problems = Problems()
    problems.one_of("preflight", cfg.get("preflight"), (True, False, "only"))
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
    """Returns the folder in which exp_manager will put the run. None: a new one each time (resume_if_exists=false)."""
    manager = cfg.get("exp_manager") or {}
    if manager.get("explicit_log_dir"):
        return Path(str(manager["explicit_log_dir"]))
    if not manager.get("resume_if_exists"):
        return None
    version = manager.get("version") or os.environ.get("NEMO_EXPM_VERSION") or ""
    return Path(str(manager.get("exp_dir") or "nemo_experiments")) / str(manager.get("name") or "default") / version


def checkpoint_folder(cfg: Mapping[str, Any]) -> Path | None:
    """Returns the folder of the run's checkpoints. None: it is a new one each time."""
    run, params = run_folder(cfg), (cfg.get("exp_manager") or {}).get("checkpoint_callback_params") or {}
    return None if run is None else Path(str(params.get("dirpath") or run / "checkpoints"))
