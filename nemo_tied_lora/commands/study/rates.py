# SPDX-License-Identifier: Apache-2.0
"""What the sweep decides, on validation data alone: learning rates, and which tasks have most headroom."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from nemo_tied_lora.commands.study.cells import SWEEP, Cell, base_cell, method_cell
from nemo_tied_lora.commands.study.plan import Method, Study, StudyTask

__all__ = ["Choice", "choose_rate", "headroom", "next_rate", "tasks_of"]


@dataclass(frozen=True, kw_only=True)
class Choice:
    """The sweep of a method on a task."""

    cells: tuple[Cell, ...]  # of all rates that the rule asks for, in ascending order
    losses: Mapping[float, float]  # rate to the answers' loss on validation data; infinite: the run diverged
    rate: float | None  # the chosen one; None: a cell has no result yet
    at_edge: bool = False  # the best rate is the least or the largest, although the grid has grown


def choose_rate(study: Study, method: Method, task: StudyTask, losses: Mapping[str, float]) -> Choice:
    """The rate with the lowest validation loss. A grid whose best rate is at its edge grows there, `sweep.growth` times.

    A method with one rate has no sweep; one with `rates_of` takes the other method's choice.

    Args:
        losses: key of a cell to the answers' loss on validation data, in nats per token.
    """
    if method.rates_of is not None:
        other = choose_rate(study, study.method(method.rates_of), task, losses)
        return Choice(cells=(), losses={}, rate=other.rate, at_edge=other.at_edge)
    if len(method.rates) == 1:
        return Choice(cells=(), losses={}, rate=method.rates[0])
    grid = list(method.rates)
    for growths_left in range(study.sweep.growth, -1, -1):
        cells = [method_cell(study, method, task, SWEEP, rate, study.sweep.seed) for rate in grid]
        known = {cell.rate: losses[cell.key] for cell in cells if cell.rate is not None and cell.key in losses}
        choice = Choice(cells=tuple(cells), losses=known, rate=None)
        if len(known) < len(grid):
            return choice
        best = min(grid, key=lambda rate: (known[rate], rate))
        at_edge = best in (grid[0], grid[-1])
        if not at_edge or not growths_left:
            break
        grid = [next_rate(best, -1), *grid] if best == grid[0] else [*grid, next_rate(best, 1)]
    return Choice(cells=choice.cells, losses=known, rate=best, at_edge=at_edge)


def headroom(study: Study, losses: Mapping[str, float]) -> dict[str, float | None]:
    """For each task: the base's validation loss minus the reference's, at the reference's best rate. None: not known yet."""
    return {task.name: _gain(study, task, losses) for task in study.tasks}


def tasks_of(study: Study, method: Method, losses: Mapping[str, float]) -> Sequence[StudyTask] | None:
    """The tasks of a method. None: the sweep has not decided yet which have most headroom."""
    if method.tasks is None:
        return study.tasks
    if not method.wants_headroom:
        return [study.task(name) for name in method.tasks]
    gains = headroom(study, losses)
    if any(gain is None for gain in gains.values()):
        return None
    ranked = sorted(study.tasks, key=lambda task: -(gains[task.name] or 0.0))[: study.claim.headroom_tasks]
    return [task for task in study.tasks if task in ranked]


def _gain(study: Study, task: StudyTask, losses: Mapping[str, float]) -> float | None:
    base = losses.get(base_cell(study, task, SWEEP).key)
    choice = choose_rate(study, study.method(study.claim.reference), task, losses)
    if base is None or choice.rate is None or choice.rate not in choice.losses:
        return None
    return base - choice.losses[choice.rate]


def next_rate(rate: float, direction: int) -> float:
    """The neighbour of a rate among 1, 2 and 5 times the powers of ten."""
    exponent = math.floor(math.log10(rate) + 1e-9)
    place = (1, 2, 5).index(round(rate / 10**exponent)) + direction
    return float(f"{(1, 2, 5)[place % 3]}e{exponent + place // 3}")
