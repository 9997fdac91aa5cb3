# SPDX-License-Identifier: Apache-2.0
"""Estimates how long the rest of a study takes, from the runs that are done."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import mean

from nemo_tied_lora.commands.study.cells import FINAL, Cell
from nemo_tied_lora.commands.study.results import Results
from nemo_tied_lora.commands.study.schedule import Schedule

__all__ = ["seconds_left"]


def seconds_left(plan: Schedule, results: Results, at_once: int) -> float | None:
    """The seconds until all runs are done, `at_once` at a time. None: no run is done yet.

    A run counts as the mean of the runs of its kind (phase; base or method) on its task, else of its kind, else of all.
    """
    done = [(cell, result.seconds) for cell in plan.cells if (result := results.of(cell)) is not None]
    if not done:
        return None
    left = [(_kind(cell), cell.task) for cell in plan.cells if cell not in results]
    for waiting in plan.waiting:
        left += [((FINAL, False), waiting.task or "")] * waiting.runs
    return sum(_expected(kind, task, done) for kind, task in left) / at_once


def _expected(kind: tuple[str, bool], task: str, done: Sequence[tuple[Cell, float]]) -> float:
    same_kind = [(cell.task, seconds) for cell, seconds in done if _kind(cell) == kind]
    same_task = [seconds for name, seconds in same_kind if name == task]
    return mean(same_task or [seconds for _, seconds in same_kind] or [seconds for _, seconds in done])


def _kind(cell: Cell) -> tuple[str, bool]:
    return cell.phase, cell.is_base
