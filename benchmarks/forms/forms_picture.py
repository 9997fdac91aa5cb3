# SPDX-License-Identifier: Apache-2.0
"""docs/forms.png: each form's loss minus LoRA's at the same count, task by task."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nemo_tied_lora.commands.study.results import Results
from nemo_tied_lora.plots import panels
from nemo_tied_lora.tasks.intervals import Interval

from .analysis import verdicts
from .plan import Plan
from .schedule import entries, sweep_entry

__all__ = ["PICTURE", "Point", "draw", "points"]

PICTURE = "forms.png"
_REFERENCE = "lora"
_ROOM = 1.2
"""The axes end at so many times the distance from 0 of nine tenths of the points, with their intervals."""


@dataclass(frozen=True)
class Point:
    """A form's loss minus LoRA's. difference: with its interval, on test items; without one, on validation items."""

    title: str
    budget: str
    difference: Interval | float

    @property
    def value(self) -> float:
        """The difference alone, in nats per token."""
        return self.difference.value if isinstance(self.difference, Interval) else self.difference

    @property
    def distance(self) -> float:
        """The distance from 0 of the point, with its interval."""
        ends = [self.difference.low, self.difference.high] if isinstance(self.difference, Interval) else [self.value]
        return max(map(abs, ends))


def points(plan: Plan, results: Results) -> dict[str, list[Point]]:
    """Task to each form that has a result on it, at each budget at which LoRA has one too."""
    losses = results.losses()
    found: dict[str, list[Point]] = {task.name: [] for task in plan.tasks}
    for budget in plan.budgets:
        forms = entries(plan, budget)
        reference = next(one for one in forms if one.candidate.name == _REFERENCE)
        for one in (form for form in forms if form is not reference):
            for task, verdict in zip(plan.tasks, verdicts(plan, one, reference, results), strict=True):
                mine, theirs = (
                    min(sweep_entry(plan, task, each, losses).losses.values(), default=None)
                    for each in (one, reference)
                )
                if verdict.difference is not None:
                    found[task.name].append(Point(one.candidate.title, budget, verdict.difference))
                elif mine is not None and theirs is not None:
                    found[task.name].append(Point(one.candidate.title, budget, mine - theirs))
    return found


def draw(path: Path, plan: Plan, results: Results) -> None:
    """A panel for each task, all of one scale. What lies beyond it is drawn at the edge, with its number."""
    by_task = points(plan, results)
    known = {point.title for its in by_task.values() for point in its}
    titles = [one.title for one in plan.candidates if one.title in known]
    rows = {title: place for place, title in enumerate(titles)}
    edge = _edge([point for its in by_task.values() for point in its])
    title = "loss of the answers minus LoRA's at the same count; filled: test items, 95%; hollow: validation items, best rate"
    width, height = 4 + 4 * len(plan.tasks), 2.5 + 0.25 * len(titles)
    with panels(path, 1, columns=len(plan.tasks), width=width, height=height, title=title) as axes:
        for one, task in zip(axes, plan.tasks, strict=True):
            _panel(one, plan, by_task[task.name], rows, edge)
            one.set_title(f"{task.family}: {task.name}", fontsize="small")
            labels = titles if one is axes[0] else [""] * len(titles)
            one.set_yticks(range(len(titles)), labels, fontsize="x-small")
            one.set_ylim(max(1, len(titles)) - 0.5, -0.5)


def _panel(axes: Any, plan: Plan, its: list[Point], rows: Mapping[str, int], edge: float) -> None:
    labels = {budget: f"at most {count:,} trained" for budget, count in plan.budgets.items()}
    for point in its:
        number = list(plan.budgets).index(point.budget)
        place = rows[point.title] + 0.3 * (number - (len(plan.budgets) - 1) / 2)
        style = {"color": f"C{number}", "label": labels.pop(point.budget, None)}
        if abs(point.value) > edge:
            side = edge if point.value > 0 else -edge
            axes.plot([side], [place], ">" if side > 0 else "<", fillstyle="none", clip_on=False, **style)
            text = f"   {point.value:+.2f}   "
            axes.annotate(text, (side, place), ha="right" if side > 0 else "left", va="center", fontsize="x-small")
        elif isinstance(point.difference, Interval):
            low, high = point.value - point.difference.low, point.difference.high - point.value
            axes.errorbar([point.value], [place], xerr=[[low], [high]], fmt="o", capsize=3, **style)
        else:
            axes.plot([point.value], [place], "o", fillstyle="none", **style)
    axes.axvline(0.0, color="black", linewidth=0.8)
    axes.set_xlim(-edge, edge)
    axes.set_xlabel("nats per token; less is better")
    axes.grid(visible=True, alpha=0.25)
    if its:
        axes.legend(fontsize="x-small", loc="upper center", bbox_to_anchor=(0.5, -0.1))  # inside, it would hide points


def _edge(its: list[Point]) -> float:
    distances = sorted(point.distance for point in its)
    return _ROOM * distances[(9 * len(distances)) // 10] if distances and distances[-1] else 1.0
