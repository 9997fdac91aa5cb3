# SPDX-License-Identifier: Apache-2.0
"""A grid of learning rates that grows at its edges, and what a preset gains at each rate."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from nemo_tied_lora.commands.study.rates import next_rate
from nemo_tied_lora.config import RankBudget, TiedLoraConfig

from .cells import Cell, base_cell, cell
from .form import Form
from .plan import BEST, PLAIN, Candidate, Plan

__all__ = [
    "Checked",
    "Curve",
    "Losses",
    "OneRate",
    "StageRun",
    "Swept",
    "best_gains",
    "best_rule",
    "checked",
    "curves",
    "grown",
    "one_rate",
    "preset_form",
    "stage_runs",
]

Losses = Mapping[str, float]
"""Key of a cell to the answers' loss in nats per token; infinite if the run diverged."""


@dataclass(frozen=True)
class Swept:
    """The rates of one form on one task."""

    cells: tuple[Cell, ...]
    losses: Mapping[float, float]
    rate: float | None  # the best; None: a cell has no result yet
    at_edge: bool = False


def grown(rates: Sequence[float], growth: int, make: Callable[[float], Cell], losses: Losses) -> Swept:
    """Sweeps a grid of rates; while the best is at its edge, the grid grows there by one rate, at most `growth` times."""
    grid = sorted(rates)
    for left in range(growth, -1, -1):
        cells = tuple(make(rate) for rate in grid)
        known = {rate: losses[one.key] for rate, one in zip(grid, cells, strict=True) if one.key in losses}
        if len(known) < len(grid):
            return Swept(cells, known, None)
        best = min(grid, key=lambda rate: (known[rate], rate))
        at_edge = best in (grid[0], grid[-1])
        if not at_edge or not left:
            break
        grid = [next_rate(best, -1), *grid] if best == grid[0] else [*grid, next_rate(best, 1)]
    return Swept(cells, known, best, at_edge)


@dataclass(frozen=True)
class StageRun:
    """One preset at one rank under one rule, as a stage asks for it."""

    preset: str
    rank: int
    rule: str
    swept: Swept


def stage_runs(plan: Plan, losses: Losses) -> tuple[list[StageRun], int]:
    """What the stages ask for, in their order, and how many runs wait for the best rule to be known.

    A stage with the rule `best` takes each preset's rule and rate, and the neighbours of the rate, from the stages before
    it, when they are complete.
    """
    found: list[StageRun] = []
    waiting = 0
    for stage in plan.stages:
        for preset in stage.presets:
            rule, rates = stage.rule, stage.rates
            if rule == BEST:
                before = [run for run in found if run.preset == preset]
                best = best_rule(_curves(plan, before, losses), preset)
                if best is None or any(run.swept.rate is None for run in before):
                    waiting += 3 * len(stage.ranks)
                    continue
                rule = best.rule
                rates = (next_rate(best.rate, -1), best.rate, next_rate(best.rate, 1))
            found += [
                StageRun(preset, rank, rule, _swept(plan, preset, rank, rule, rates, losses)) for rank in stage.ranks
            ]
    return found, waiting


def _swept(plan: Plan, preset: str, rank: int, rule: str, rates: Sequence[float], losses: Losses) -> Swept:
    (task,) = plan.tasks
    form = preset_form(plan.candidate(preset), rank)
    multipliers = plan.multipliers(rule, rank)
    name = f"{preset}_r{rank}" + ("" if rule == PLAIN else f"_{rule}")

    def make(rate: float) -> Cell:
        return cell(plan, task, "validation", name, form, multipliers=multipliers, rate=rate, seed=plan.sweep.seed)

    return grown(rates, plan.sweep.growth, make, losses)


def preset_form(candidate: Candidate, rank: int) -> Form:
    """A preset at a rank. One that prunes keeps as much of it as the package's does."""
    budget = TiedLoraConfig.preset(candidate.name, rank=rank).rank_budget
    keep = {"keep": budget.target_rank} if isinstance(budget, RankBudget) else {}
    return Form.of({**candidate.form, "rank": rank, **keep})


@dataclass(frozen=True)
class Curve:
    """A preset at a rank under a rule: its gain (base's loss minus its own) at each learning rate."""

    preset: str
    rank: int
    rule: str
    gains: Mapping[float, float]


def curves(plan: Plan, losses: Losses) -> list[Curve]:
    """Those with at least one result. Runs of several stages with the same preset, rank and rule are one curve."""
    return _curves(plan, stage_runs(plan, losses)[0], losses)


def _curves(plan: Plan, runs: Sequence[StageRun], losses: Losses) -> list[Curve]:
    (task,) = plan.tasks
    base = losses.get(base_cell(plan, task, "validation").key)
    if base is None:
        return []
    found: dict[tuple[str, int, str], dict[float, float]] = {}
    for run in runs:
        gains = {rate: base - loss for rate, loss in run.swept.losses.items()}
        found.setdefault((run.preset, run.rank, run.rule), {}).update(gains)
    # At rank 8 a rule of powers alone is the plain one: its runs are shared.
    for (preset, rank, rule), gains in list(found.items()):
        if rank == 8 and _has_powers_alone(plan, rule):
            for other in dict.fromkeys(r for p, _, r in found if p == preset and _has_powers_alone(plan, r)):
                found.setdefault((preset, rank, other), {}).update(gains)
    return [Curve(*key, gains=dict(sorted(gains.items()))) for key, gains in found.items() if gains]


def _has_powers_alone(plan: Plan, rule: str) -> bool:
    return all(c == 1 for c, _ in plan.rules[rule].values())


def best_gains(found: Sequence[Curve]) -> dict[tuple[str, int], float]:
    """The best gain of each preset at each rank, at any rate and under any rule."""
    best: dict[tuple[str, int], float] = {}
    for curve in found:
        key = curve.preset, curve.rank
        best[key] = max(best.get(key, -math.inf), *curve.gains.values())
    return best


@dataclass(frozen=True)
class OneRate:
    """A preset under a rule with one learning rate at all its ranks."""

    preset: str
    rule: str
    rate: float
    shares: Mapping[int, float]
    """Rank to the share of the best gain that this rate reaches."""

    @property
    def worst(self) -> float:
        """The smallest share."""
        return min(self.shares.values())


def one_rate(found: Sequence[Curve], preset: str, rule: str) -> OneRate | None:
    """The rate whose worst share of the best gains is largest, among those tried at all the curves' ranks.

    None: no rate was tried at two ranks.
    """
    best = best_gains(found)
    own = [curve for curve in found if (curve.preset, curve.rule) == (preset, rule)]
    if len(own) < 2:
        return None
    common = set.intersection(*(set(curve.gains) for curve in own))
    options = [
        OneRate(preset, rule, rate, {c.rank: c.gains[rate] / best[preset, c.rank] for c in sorted(own, key=_rank)})
        for rate in sorted(common)
    ]
    return max(options, key=lambda one: one.worst, default=None)


def _rank(curve: Curve) -> int:
    return curve.rank


def best_rule(found: Sequence[Curve], preset: str) -> OneRate | None:
    """The rule and rate of a preset whose worst share is largest. None: no rate was tried at two ranks."""
    rules = dict.fromkeys(curve.rule for curve in found if curve.preset == preset)
    options = [one for rule in rules if (one := one_rate(found, preset, rule)) is not None]
    return max(options, key=lambda one: one.worst, default=None)


@dataclass(frozen=True)
class Checked:
    """A preset with its best rate of the plain rule, and the same with one change of the recipe."""

    preset: str
    rank: int
    change: Mapping[str, float]
    rate: float
    usual: float
    """The loss with the usual recipe."""
    cell: Cell


def checked(plan: Plan, losses: Losses) -> tuple[list[Checked], int]:
    """The checks of the recipe whose rate is known, and how many runs wait for theirs."""
    (task,) = plan.tasks
    runs, _ = stage_runs(plan, losses)
    found: list[Checked] = []
    waiting = 0
    for check in plan.checks:
        for preset in check.presets:
            for rank in check.ranks:
                swept = [r.swept for r in runs if (r.preset, r.rank, r.rule) == (preset, rank, PLAIN)]
                if not swept or swept[0].rate is None:
                    waiting += len(check.changes)
                    continue
                rate = swept[0].rate
                for change in check.changes:
                    other = replace(plan, training=replace(plan.training, **dict[str, Any](change)))
                    name = "_".join([f"{preset}_r{rank}", *(f"{key}_{value:g}" for key, value in change.items())])
                    form = preset_form(plan.candidate(preset), rank)
                    one = cell(other, task, "validation", name, form, multipliers={}, rate=rate, seed=plan.sweep.seed)
                    found.append(Checked(preset, rank, change, rate, swept[0].losses[rate], one))
    return found, waiting
