# SPDX-License-Identifier: Apache-2.0
"""What the results say: each form's loss, and the differences of forms, with their intervals."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from nemo_tied_lora.commands.study.results import Results
from nemo_tied_lora.tasks.intervals import Interval, difference_over_seeds, over_seeds
from nemo_tied_lora.tasks.metrics import METRICS

from .cells import ACCURACY, LOSS
from .plan import Plan, Task
from .schedule import Entry, sweep_entry, test_cell

__all__ = ["Score", "Verdict", "scores", "verdicts"]


@dataclass(frozen=True)
class Score:
    """A form at a budget on a task: test runs of its seeds."""

    entry: Entry
    task: str
    rate: float | None
    at_edge: bool
    validation: float | None
    """The best loss of the sweep."""
    seeds: tuple[int, ...]
    loss: Interval | None
    accuracy: Interval | None


@dataclass(frozen=True)
class Verdict:
    """A form's loss minus another's, on test items of the seeds that both have."""

    task: str
    seeds: tuple[int, ...]
    difference: Interval | None
    complete: bool

    @property
    def beats(self) -> bool | None:
        """Whether the whole interval is below 0. None: not all seeds are done."""
        return None if self.difference is None or not self.complete else self.difference.high < 0


def scores(plan: Plan, task: Task, found: Sequence[Entry], results: Results) -> list[Score]:
    """Each form of a budget on a task."""
    return [_score(plan, task, one, results) for one in found]


def verdicts(plan: Plan, entry: Entry, other: Entry, results: Results) -> list[Verdict]:
    """A form against another one at the same budget, task by task."""
    found = []
    for task in plan.tasks:
        mine, theirs = (_runs(plan, task, one, results, LOSS) for one in (entry, other))
        seeds = tuple(sorted(mine.keys() & theirs.keys()))
        between = None
        if seeds:
            between = difference_over_seeds(
                [theirs[seed] for seed in seeds],
                [mine[seed] for seed in seeds],
                METRICS[LOSS].value,
                resamples=plan.resamples,
            )
        found.append(Verdict(task.name, seeds, between, len(seeds) == plan.seeds))
    return found


def _score(plan: Plan, task: Task, entry: Entry, results: Results) -> Score:
    swept = sweep_entry(plan, task, entry, results.losses())
    runs = {metric: _runs(plan, task, entry, results, metric) for metric in (LOSS, ACCURACY)}
    intervals = {
        metric: over_seeds(list(of.values()), METRICS[metric].value, resamples=plan.resamples) if of else None
        for metric, of in runs.items()
    }
    return Score(
        entry=entry,
        task=task.name,
        rate=swept.rate,
        at_edge=swept.at_edge,
        validation=min(swept.losses.values(), default=None),
        seeds=tuple(runs[LOSS]),
        loss=intervals[LOSS],
        accuracy=intervals[ACCURACY],
    )


def _runs(plan: Plan, task: Task, entry: Entry, results: Results, metric: str) -> dict[int, np.ndarray]:
    """Seed to a metric's statistics (items, k) of the test run; runs that diverged are left out."""
    rate = sweep_entry(plan, task, entry, results.losses()).rate
    found = {}
    for seed in range(1, plan.seeds + 1) if rate is not None else ():
        assert rate is not None
        result = results.by_key.get(test_cell(plan, task, entry, rate, seed).key)
        if result is not None and not result.diverged and metric in result.values["statistics"]:
            found[seed] = np.array(result.statistics(metric)).T
    return found
