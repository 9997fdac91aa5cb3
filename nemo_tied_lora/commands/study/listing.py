# SPDX-License-Identifier: Apache-2.0
"""A table of a study's runs: how many of each method and task are done, and what is missing."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from nemo_tied_lora.commands.study.cells import FINAL, SWEEP, Cell
from nemo_tied_lora.commands.study.claims import is_claimed
from nemo_tied_lora.commands.study.plan import Study
from nemo_tied_lora.commands.study.results import Results
from nemo_tied_lora.commands.study.schedule import Schedule, schedule
from nemo_tied_lora.commands.study.time_left import seconds_left
from nemo_tied_lora.tables import duration, text_table

__all__ = ["done_rows", "listing", "totals"]

_MOST_SHOWN = 10


def listing(study: Study, results: Results, folder_of: Callable[[Cell], Path], at_once: int) -> str:
    """What `tied-lora compare list=true` prints."""
    plan = schedule(study, results.losses())
    left = [cell for cell in plan.cells if cell not in results]
    states = {cell.key: _state(folder_of(cell)) for cell in left}
    done, total = totals(plan, results)
    seconds = seconds_left(plan, results, at_once)
    parts = [f"{study.name}: {done} of {total} runs are done", text_table(done_rows(study, plan, results))]
    if left:
        parts.append("\n".join(["next:", *(f"  {cell.label}{states[cell.key]}" for cell in left[:_MOST_SHOWN])]))
    others = [f"  {cell.label}{states[cell.key]}" for cell in left[_MOST_SHOWN:] if states[cell.key]]
    parts += ["\n".join(["further ones:", *others])] if others else []
    if seconds is not None and left:
        parts.append(f"about {duration(seconds)} left, {at_once} at a time")
    return "\n\n".join(parts)


def totals(plan: Schedule, results: Results) -> tuple[int, int]:
    """The runs that are done, and all runs, those that wait for the sweep too."""
    return sum(cell in results for cell in plan.cells), len(plan.cells) + sum(one.runs for one in plan.waiting)


def done_rows(study: Study, plan: Schedule, results: Results) -> list[list[str]]:
    """A table with a row for each method and phase, and a column for each task: "2 of 3". Empty: nothing is planned."""
    rows = [["runs", *(task.name for task in study.tasks)]]
    for phase, what in ((SWEEP, "sweep"), (FINAL, "test")):
        for name in (*study.bases, *(method.name for method in study.methods)):
            cells = [cell for cell in plan.cells if (cell.phase, cell.method) == (phase, name)]
            row = []
            for task in study.tasks:
                own = [cell for cell in cells if cell.task == task.name]
                waiting = [w.runs for w in plan.waiting if phase == FINAL and (w.method, w.task) == (name, task.name)]
                count = len(own) + sum(waiting)
                row.append(f"{sum(cell in results for cell in own)} of {count}" if count else "")
            unknown = sum(w.runs for w in plan.waiting if phase == FINAL and (w.method, w.task) == (name, None))
            if any(row) or unknown:
                more = f" ({unknown} more; the sweep decides the tasks)" if unknown else ""
                rows.append([f"{what}: {study.title_of(name)}{more}", *row])
    return rows


def _state(place: Path) -> str:
    if is_claimed(place):
        return " (running)"
    if (place / "failed.json").exists():
        return f" (failed before; see {place})"
    return " (begun)" if (place / "training").exists() or (place / "evaluation").exists() else ""
