# SPDX-License-Identifier: Apache-2.0
"""Which runs a study has, as far as its sweep has decided them, and in which order they run."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from nemo_tied_lora.commands.study.cells import FINAL, SWEEP, Cell, base_cell, method_cell
from nemo_tied_lora.commands.study.plan import Study
from nemo_tied_lora.commands.study.rates import choose_rate, tasks_of

__all__ = ["Schedule", "Waiting", "schedule"]


@dataclass(frozen=True)
class Waiting:
    """Runs that the study plans, and whose settings the sweep has not decided yet."""

    method: str
    task: str | None  # None: the task too depends on the sweep
    runs: int
    why: str


@dataclass(frozen=True)
class Schedule:
    """The runs in their order, and those that wait for the sweep."""

    cells: tuple[Cell, ...]
    waiting: tuple[Waiting, ...]


def schedule(study: Study, losses: Mapping[str, float]) -> Schedule:
    """The runs of a study.

    They run in waves: the first seeds of the methods of wave 1, then their second seeds and the first seeds of the methods
    of wave 2, and so on. A wave goes through the tasks; for each it runs the base, the sweep, then all methods. So a study
    that is stopped has compared methods with each other, on as many tasks as time allowed.

    Args:
        losses: key of a cell to the answers' loss on validation data, in nats per token.
    """
    phases = (SWEEP, FINAL) if any(len(method.rates) > 1 for method in study.methods) else (FINAL,)
    cells = [base_cell(study, task, phase) for phase in phases for task in study.tasks]
    cells += [base_cell(study, task, FINAL, name) for name in study.bases for task in study.tasks]
    waiting: list[Waiting] = []
    for method in study.methods:
        tasks = tasks_of(study, method, losses)
        if tasks is None:
            runs = study.claim.headroom_tasks * method.seeds
            waiting.append(Waiting(method.name, None, runs, "the sweep decides which tasks have most headroom"))
        for task in tasks or ():
            choice = choose_rate(study, method, task, losses)
            cells += choice.cells
            if choice.rate is None:
                waiting.append(Waiting(method.name, task.name, method.seeds, "the sweep decides the learning rate"))
            else:
                seeds = range(1, method.seeds + 1)
                cells += [method_cell(study, method, task, FINAL, choice.rate, seed) for seed in seeds]
    cells = list({cell.key: cell for cell in cells}.values())
    return Schedule(tuple(sorted(cells, key=lambda cell: _place(study, cell))), tuple(waiting))


def _place(study: Study, cell: Cell) -> tuple[float, ...]:
    methods = [*study.bases, *(method.name for method in study.methods)]
    method, task = methods.index(cell.method), [one.name for one in study.tasks].index(cell.task)
    return (cell.wave, task, not cell.is_base, cell.phase == FINAL, method, cell.rate or 0.0, cell.seed or 0)
