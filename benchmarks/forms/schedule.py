# SPDX-License-Identifier: Apache-2.0
"""Which runs a plan has, in their order, as far as the results decide them. Pure: the same results, the same runs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from .cells import Cell, base_cell, cell
from .form import Form, fitted
from .plan import Candidate, Plan, Task
from .sweeping import Losses, Swept, checked, grown, stage_runs

__all__ = [
    "Entry",
    "Schedule",
    "entries",
    "forms_schedule",
    "kept",
    "rates_schedule",
    "schedule",
    "sweep_entry",
    "test_cell",
]


@dataclass(frozen=True)
class Schedule:
    """The runs that can be done now, in their order, and how many more the plan expects."""

    cells: tuple[Cell, ...]
    waiting: int


@dataclass(frozen=True)
class Entry:
    """A form at a budget."""

    candidate: Candidate
    budget: str
    form: Form

    @property
    def name(self) -> str:
        """For labels."""
        return f"{self.candidate.name}-{self.budget}"


def schedule(plan: Plan, losses: Losses) -> Schedule:
    """The runs of a plan: a rates' sweep if it has stages, else a comparison of forms."""
    if plan.stages:
        return rates_schedule(plan, losses)
    return forms_schedule(plan, losses)


def rates_schedule(plan: Plan, losses: Losses) -> Schedule:
    """Stage after stage; in each preset after preset, rank after rank. Then the checks of the recipe."""
    (task,) = plan.tasks
    runs, waiting = stage_runs(plan, losses)
    checks, more = checked(plan, losses)
    cells = [base_cell(plan, task, "validation"), *(one for run in runs for one in run.swept.cells)]
    cells += [one.cell for one in checks]
    return Schedule(tuple({one.key: one for one in cells}.values()), waiting + more)


def entries(plan: Plan, budget: str) -> list[Entry]:
    """All forms at a budget."""
    return [
        Entry(
            one,
            budget,
            fitted(
                one.form,
                plan.sizes.linears,
                plan.sizes.layers,
                plan.budgets[budget],
                largest=one.largest,
                prunes=one.prunes,
            ),
        )
        for one in plan.candidates
    ]


def forms_schedule(plan: Plan, losses: Losses) -> Schedule:
    """Budget after budget: the first task's sweep, the others' for the forms that stay, then the test runs, seed after seed.

    At the second budget only the references and the finalists of the first run.
    """
    cells, waiting = list[Cell](), 0
    finalists: list[str] | None = None
    for budget in plan.budgets:
        found = entries(plan, budget)
        if finalists is not None:
            found = [one for one in found if one.candidate.reference or one.candidate.name in finalists]
        more, left, names = _budget(plan, found, losses)
        cells += more
        waiting += left
        finalists = names
        if names is None:
            waiting += _expected(plan, budget, plan.budgets)
            break
    return Schedule(tuple({one.key: one for one in cells}.values()), waiting)


def sweep_entry(plan: Plan, task: Task, entry: Entry, losses: Losses) -> Swept:
    """The rates of a form at a budget on a task."""

    def make(rate: float) -> Cell:
        return _cell(plan, task, "validation", entry, rate, plan.sweep.seed)

    return grown(entry.candidate.rates, plan.sweep.growth, make, losses)


def test_cell(plan: Plan, task: Task, entry: Entry, rate: float, seed: int) -> Cell:
    """A form's run on test data."""
    return _cell(plan, task, "test", entry, rate, seed)


def kept(plan: Plan, tasks: Sequence[Task], found: Sequence[Entry], number: int, losses: Losses) -> list[Entry] | None:
    """The references and the `number` best candidates, by their mean share of LoRA's gain on validation data.

    None: a sweep of the tasks is not complete.
    """
    shares = dict.fromkeys((one.name for one in found), 0.0)
    for task in tasks:
        best = {one.name: _best(sweep_entry(plan, task, one, losses)) for one in found}
        base = losses.get(base_cell(plan, task, "validation").key)
        if base is None or any(loss is None for loss in best.values()):
            return None
        reference = next(best[one.name] for one in found if one.candidate.reference)
        assert reference is not None
        for name, loss in best.items():
            assert loss is not None
            shares[name] += (base - loss) / (base - reference) / len(tasks)
    ranked = sorted((one for one in found if not one.candidate.reference), key=lambda one: -shares[one.name])
    names = {one.name for one in ranked[:number]}
    return [one for one in found if one.candidate.reference or one.name in names]


def _budget(plan: Plan, found: list[Entry], losses: Losses) -> tuple[list[Cell], int, list[str] | None]:
    """The runs at one budget, how many more it expects, and the names of the finalists (None: not known yet)."""
    first, others = plan.tasks[:1], plan.tasks[1:]
    cells = list(_sweeps(plan, first, found, losses))
    rates = len(found[0].candidate.rates)
    staying = kept(plan, first, found, plan.keep[0], losses)
    finals = (_references(found) + plan.keep[1]) * len(plan.tasks) * plan.seeds
    if staying is None:
        return cells, (_references(found) + plan.keep[0]) * len(others) * rates + finals, None
    cells += _sweeps(plan, others, staying, losses)
    finalists = kept(plan, plan.tasks, staying, plan.keep[1], losses)
    if finalists is None:
        return cells, finals, None
    cells += [base_cell(plan, task, "test") for task in plan.tasks]
    for seed in range(1, plan.seeds + 1):
        for task in plan.tasks:
            for one in finalists:
                rate = sweep_entry(plan, task, one, losses).rate
                assert rate is not None
                cells.append(test_cell(plan, task, one, rate, seed))
    names = [one.candidate.name for one in finalists if not one.candidate.reference]
    return cells, 0, names


def _sweeps(plan: Plan, tasks: Sequence[Task], found: Sequence[Entry], losses: Losses) -> Iterator[Cell]:
    for task in tasks:
        yield base_cell(plan, task, "validation")
        for one in found:
            yield from sweep_entry(plan, task, one, losses).cells


def _cell(plan: Plan, task: Task, split: str, entry: Entry, rate: float, seed: int) -> Cell:
    multipliers = plan.multipliers(entry.candidate.rule, entry.form.rank)
    return cell(plan, task, split, entry.name, entry.form, multipliers=multipliers, rate=rate, seed=seed)


def _best(swept: Swept) -> float | None:
    return None if swept.rate is None else swept.losses[swept.rate]


def _references(found: Sequence[Entry]) -> int:
    return sum(one.candidate.reference for one in found)


def _expected(plan: Plan, budget: str, budgets: Mapping[str, int]) -> int:
    """The runs of the budgets after this one."""
    after = len(budgets) - 1 - list(budgets).index(budget)
    forms = sum(one.reference for one in plan.candidates) + plan.keep[1]
    return after * forms * len(plan.tasks) * (3 + plan.seeds)
