# SPDX-License-Identifier: Apache-2.0
"""The picture of a study: quality against trained parameters, a panel for each task."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from nemo_tied_lora.commands.study.comparison import Scores, TaskSummary
from nemo_tied_lora.commands.study.plan import BASE, Study
from nemo_tied_lora.plots import panels
from nemo_tied_lora.tasks.metrics import METRICS

__all__ = ["draw"]

_MARKERS = "osD^vP*Xhd<>"
_COLORS = [*(f"C{number}" for number in range(10)), "black", "gold"]
_BESIDE = 1.06
"""Methods with equally many parameters would hide each other's bars: each is drawn so much to the right of the last."""


def draw(path: Path, study: Study, summaries: Sequence[TaskSummary]) -> None:
    """Draws each method's mean over seeds with its interval, each seed as a small dot, and base and reference as lines."""
    # A task whose base alone has been measured would be an empty panel.
    shown = [
        summary
        for summary in summaries
        if any(one.primary is not None for name, one in summary.scores.items() if name != BASE)
    ]
    rows = max(1, math.ceil(len(shown) / 2))
    columns = 2 if len(shown) > 1 else 1
    title = f"{study.base.name}\nquality against trained parameters; bars are 95% intervals"
    with panels(path, rows, columns=columns, width=1.5 + 6 * columns, height=3.6 * rows + 1, title=title) as axes:
        for one, summary in zip(axes, shown, strict=False):
            _panel(one, study, summary)
        for one in axes[len(shown) :]:
            one.axis("off")


def _panel(axes: Any, study: Study, summary: TaskSummary) -> None:
    reference = summary.scores.get(study.claim.reference)
    lines = [(summary.scores[BASE], "0.5", "base", "--")]
    lines += [(reference, "C0", study.title_of(reference.method), ":")] if reference is not None else []
    for scores, color, name, style in lines:
        if scores.primary is not None:
            axes.axhline(
                scores.primary.value,
                color=color,
                linestyle=style,
                linewidth=1,
                label=f"{name} {scores.primary.value:.1f}",
            )
    drawn: list[int] = []
    for number, method in enumerate(study.methods):
        scores_of = summary.scores.get(method.name)
        if scores_of is not None and scores_of.primary is not None:
            place = scores_of.trained * _BESIDE ** drawn.count(scores_of.trained)
            color, marker = _COLORS[number % len(_COLORS)], _MARKERS[number % len(_MARKERS)]
            _point(axes, study, scores_of, place, color, marker)
            drawn.append(scores_of.trained)
    axes.set_xscale("log")
    axes.set_xlabel("trained parameters" + (" (equal numbers side by side)" if len(set(drawn)) < len(drawn) else ""))
    axes.set_ylabel(f"{METRICS[summary.task.primary].title} ({METRICS[summary.task.primary].unit})")
    axes.set_title(f"{summary.task.family}: {summary.task.name}, {summary.test_items} test items", fontsize="small")
    axes.grid(visible=True, which="major", alpha=0.25)
    axes.legend(fontsize="x-small", loc="center left", bbox_to_anchor=(1, 0.5))  # inside, it would hide points


def _point(axes: Any, study: Study, scores: Scores, place: float, color: str, marker: str) -> None:
    primary = scores.primary
    assert primary is not None
    below, above = primary.value - primary.low, primary.high - primary.value
    few = f", {len(scores.seeds)} of {scores.planned} seeds" if len(scores.seeds) < scores.planned else ""
    axes.errorbar(
        [place],
        [primary.value],
        yerr=[[max(0.0, below)], [max(0.0, above)]],
        color=color,
        marker=marker,
        markersize=6,
        capsize=3,
        linestyle="",
        label=f"{study.title_of(scores.method)}{few}",
    )
    axes.scatter([place] * len(scores.each), scores.each, color=color, s=8, alpha=0.5)
