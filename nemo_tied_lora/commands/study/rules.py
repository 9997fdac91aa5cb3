# SPDX-License-Identifier: Apache-2.0
"""The rules of a study in words, with its numbers. The page shows them."""

from __future__ import annotations

from nemo_tied_lora.commands.study.plan import Study
from nemo_tied_lora.tasks.metrics import METRICS

__all__ = ["beyond_rule", "headroom_rule", "rate_rule", "verdict_rules"]


def verdict_rules(study: Study) -> list[str]:
    """When a difference is called what."""
    points, share = study.claim.points, study.claim.share_of_gain
    unit = "point" if points == 1 else "points"
    return [
        f"The margin is {points:g} {unit}, or {share:.0%} of what the method compared with gains over the base if that is more.",
        "**Comparable**: the whole interval is inside the margin. **Worse** or **better**: the interval does not hold 0, "
        'and not all of it is inside the margin. **Undecided**: any other interval. So "undecided" does not mean '
        '"equal": more seeds or more test items are needed.',
    ]


def beyond_rule(study: Study) -> str:
    """When a base cannot do a task."""
    bounds = ", ".join(
        f"{METRICS[task.primary].title} {task.beyond_below:g} on {task.name}"
        for task in study.tasks
        if task.beyond_below
    )
    if not bounds:
        return ""
    return (
        f"**Beyond this base**: {study.title_of(study.claim.reference)} scores less than {bounds}. Where it fails, a "
        "difference of two methods says nothing about the claim."
    )


def rate_rule(study: Study) -> str:
    """How learning rates are chosen."""
    sweep = study.sweep
    items = "all" if sweep.items is None else f"{sweep.items}"
    grows = {0: "", 1: " If that is at the edge of the grid, the grid grows there by one rate, once."}.get(
        sweep.growth,
        f" If that is at the edge of the grid, the grid grows there by one rate, at most {sweep.growth} times.",
    )
    differing = "rank or targets" if len(study.bases) == 1 else "rank, targets or the precision of the base"
    return (
        f"Each method has its own rate on each task: the one with the lowest loss of the answers on {items} validation "
        f"items, after {sweep.steps} steps with seed {sweep.seed}.{grows} Test data decides nothing. Methods that differ only in "
        f"{differing} from a method of the sweep use its rates."
    )


def headroom_rule(study: Study) -> str:
    """Which tasks get the methods that want headroom."""
    if not any(method.wants_headroom for method in study.methods):
        return ""
    names = "; ".join(method.title for method in study.methods if method.wants_headroom)
    return (
        f"Only on tasks with most headroom, {study.claim.headroom_tasks} of them: {names}. Headroom is how far the base's "
        f"validation loss falls with {study.title_of(study.claim.reference)} at its best rate in the sweep."
    )
