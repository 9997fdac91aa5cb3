# SPDX-License-Identifier: Apache-2.0
"""The run that this process is a rank of: what the command that started it and the callbacks inside it share."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from nemo_tied_lora.resilience.status_file import RunStatus

if TYPE_CHECKING:  # it imports torch
    from nemo_tied_lora.resilience.dead_rank_watchdog import Watchdog

__all__ = ["RankRun", "current_run", "set_current_run"]


@dataclass
class RankRun:
    """One rank's part of a run."""

    status: RunStatus
    exit_code: int
    """Of a run that was asked to stop and can be continued."""
    stuck_s: float
    """The limit of a collective; 0: torch's own."""
    watchdog: Watchdog | None = None
    asked_to_stop: str | None = None
    """The signal that this rank got."""
    can_save: bool = False
    """From the first step to the last: a signal is answered at a step's start, by all ranks together."""


_current: RankRun | None = None


def current_run() -> RankRun | None:
    """This process's run; None where NeMo's classes are used without a command of ours."""
    return _current


def set_current_run(run: RankRun) -> None:
    """Called once, by the command, before the work begins."""
    global _current
    _current = run
