# SPDX-License-Identifier: Apache-2.0
"""What the results of a study say: scores with intervals, differences of methods, and a verdict on each.

Intervals are 95% bootstrap intervals over seeds and items (`tasks.intervals`), paired where methods are compared.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import mean

import numpy as np

from nemo_tied_lora.commands.study.cells import FINAL, LOSS, base_cell, method_cell
from nemo_tied_lora.commands.study.plan import BASE, Study, StudyTask
from nemo_tied_lora.commands.study.rates import choose_rate, tasks_of
from nemo_tied_lora.commands.study.results import Result, Results
from nemo_tied_lora.errors import ConfigError
from nemo_tied_lora.tasks.intervals import Interval, difference_over_seeds, over_seeds
from nemo_tied_lora.tasks.metrics import METRICS

__all__ = ["Difference", "Scores", "TaskSummary", "summarise"]


@dataclass(frozen=True, kw_only=True)
class Scores:
    """A method, or one of the bases, on one task."""

    method: str
    trained: int
    rate: float | None
    planned: int  # seeds
    seeds: tuple[int, ...]  # those with a result that did not diverge; (0,) for a base
    diverged: int
    primary: Interval | None  # the mean over seeds
    each: tuple[float, ...]  # the primary metric of each seed
    others: dict[str, float]  # other metrics, means over seeds
    loss: Interval | None
    groups: dict[str, float]  # the primary metric of each group of items, mean over seeds


@dataclass(frozen=True, kw_only=True)
class Difference:
    """A method minus another one, in the primary metric, over the seeds that both have."""

    method: str
    other: str
    planned: int
    seeds: tuple[int, ...]
    primary: Interval | None
    loss: Interval | None
    margin: float | None  # None: the base has no result yet
    beyond: bool  # the base cannot do the task: the study's reference scores less than the rule asks for
    verdict: str  # comparable, worse, better, undecided, beyond this base, or no results yet


@dataclass(frozen=True, kw_only=True)
class TaskSummary:
    """All that the results say of one task."""

    task: StudyTask
    scores: dict[str, Scores]  # the bases and each method that the task has
    differences: tuple[Difference, ...]  # the claim first, then what is shown beside it, the rival, and other pairs
    test_items: int | None


def summarise(study: Study, results: Results) -> list[TaskSummary]:
    """Computes the summary of each task.

    Raises:
        ConfigError: two results of a task are about different items.
    """
    return [_summary(study, task, results) for task in study.tasks]


def _summary(study: Study, task: StudyTask, results: Results) -> TaskSummary:
    losses = results.losses()
    cells = {name: {0: base_cell(study, task, FINAL, name)} for name in study.bases}
    rates: dict[str, float | None] = dict.fromkeys(study.bases)
    for method in study.methods:
        tasks = tasks_of(study, method, losses)
        if tasks is not None and task in tasks:
            rate = rates[method.name] = choose_rate(study, method, task, losses).rate
            seeds = range(1, method.seeds + 1) if rate is not None else ()
            cells[method.name] = {s: method_cell(study, method, task, FINAL, rate or 0.0, s) for s in seeds}
    found = {
        name: {seed: result for seed, cell in own.items() if (result := results.of(cell)) is not None}
        for name, own in cells.items()
    }
    _check_same_items(task, [result for own in found.values() for result in own.values() if not result.diverged])
    planned = {**dict.fromkeys(study.bases, 1), **{method.name: method.seeds for method in study.methods}}
    scores = {name: _scores(study, task, name, rates[name], planned[name], own) for name, own in found.items()}
    pairs = [(study.claim.candidate, study.claim.reference), *study.claim.also.items()]
    pairs += [(study.claim.candidate, study.claim.rival)] if study.claim.rival is not None else []
    pairs += [pair for pair in study.claim.pairs.items() if pair not in pairs]
    differences = [
        _difference(study, task, scores, first, second, found)
        for first, second in pairs
        if first in found and second in found
    ]
    counts = [r.values["items"]["count"] for own in found.values() for r in own.values() if not r.diverged]
    return TaskSummary(
        task=task, scores=scores, differences=tuple(differences), test_items=counts[0] if counts else None
    )


def _check_same_items(task: StudyTask, results: Sequence[Result]) -> None:
    other = next((r for r in results if r.values["items"]["ids"] != results[0].values["items"]["ids"]), None)
    if other is not None:
        raise ConfigError(
            [f"{other.path}: is about other test items of {task.name} than {results[0].path.name}; remove one of them"]
        )


def _scores(
    study: Study, task: StudyTask, name: str, rate: float | None, planned: int, found: dict[int, Result]
) -> Scores:
    good = {seed: result for seed, result in found.items() if not result.diverged}
    runs = list(good.values())
    return Scores(
        method=name,
        trained=max((result.values["trained_parameters"] for result in found.values()), default=0),
        rate=rate,
        planned=planned,
        seeds=tuple(good),
        diverged=len(found) - len(good),
        primary=_mean(study, runs, task.primary),
        each=tuple(result.values["scores"][task.primary] for result in runs),
        others={metric: mean(r.values["scores"][metric] for r in runs) for metric in task.also} if runs else {},
        loss=_mean(study, runs, LOSS),
        groups=_groups(runs, task.primary),
    )


def _array(result: Result, metric: str) -> np.ndarray:
    """A metric's statistics (items, k)."""
    return np.array(result.statistics(metric)).T


def _mean(study: Study, runs: Sequence[Result], metric: str) -> Interval | None:
    if not runs:
        return None
    return over_seeds([_array(run, metric) for run in runs], METRICS[metric].value, resamples=study.resamples)


def _groups(runs: Sequence[Result], metric: str) -> dict[str, float]:
    names = runs[0].values["items"].get("groups", {}).get("names", []) if runs else []
    found = {}
    for number, name in enumerate(names):
        members = np.array(runs[0].values["items"]["groups"]["of"]) == number
        sums = [_array(run, metric)[members].sum(0) for run in runs]
        found[name] = mean(float(METRICS[metric].value(one)) for one in sums)
    return found


def _difference(
    study: Study,
    task: StudyTask,
    scores: dict[str, Scores],
    method: str,
    other: str,
    found: Mapping[str, Mapping[int, Result]],
) -> Difference:
    good = [{s: r for s, r in found[name].items() if not r.diverged} for name in (method, other)]
    seeds = tuple(sorted(good[0].keys() & good[1].keys()))
    between = {
        metric: difference_over_seeds(
            [_array(good[1][seed], metric) for seed in seeds],
            [_array(good[0][seed], metric) for seed in seeds],
            METRICS[metric].value,
            resamples=study.resamples,
        )
        for metric in (task.primary, LOSS)
        if seeds
    }
    base, reference = scores[BASE], scores.get(study.claim.reference)
    margin = None
    if seeds and base.each:
        gain = mean(good[1][seed].values["scores"][task.primary] for seed in seeds) - base.each[0]
        margin = max(study.claim.points, study.claim.share_of_gain * gain)
    beyond = reference is not None and reference.primary is not None and reference.primary.value < task.beyond_below
    primary = between.get(task.primary)
    return Difference(
        method=method,
        other=other,
        planned=min(scores[method].planned, scores[other].planned),
        seeds=seeds,
        primary=primary,
        loss=between.get(LOSS),
        margin=margin,
        beyond=beyond,
        verdict=_verdict(primary, margin, beyond),
    )


def _verdict(difference: Interval | None, margin: float | None, beyond: bool) -> str:
    """The rule of the study, fixed before its runs."""
    if difference is None or margin is None:
        return "no results yet"
    if beyond:
        return "beyond this base"
    if -margin <= difference.low and difference.high <= margin:
        return "comparable"
    if difference.high < 0:
        return "worse"
    if difference.low > 0:
        return "better"
    return "undecided"
