# SPDX-License-Identifier: Apache-2.0
"""One run, keyed by the settings that decide its result."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from nemo_tied_lora.commands.study.cells import LOSS, settings_key
from nemo_tied_lora.tasks.training_order import ORDER

from .form import Form
from .plan import Plan, Task

__all__ = ["ACCURACY", "LOSS", "Cell", "base_cell", "cell"]

ACCURACY = "accuracy"
"""Of a choice task: how often the token in which endings differ is likeliest in the right one."""
_HARNESS = 1
"""Raise it when runs are made differently, so that old results are not used."""


@dataclass(frozen=True)
class Cell:
    """One run: the base or a form on one task."""

    label: str
    settings: Mapping[str, Any]

    @property
    def key(self) -> str:
        """A hash of the settings."""
        return settings_key(self.settings)


def base_cell(plan: Plan, task: Task, split: str) -> Cell:
    """The base without an adapter."""
    return Cell(f"{task.name}-base-{split}", {**_measured(plan, task, split), "form": None})


def cell(
    plan: Plan,
    task: Task,
    split: str,
    name: str,
    form: Form,
    *,
    multipliers: Mapping[str, float],
    rate: float,
    seed: int,
) -> Cell:
    """A form on a task. Its key does not depend on its name, only on what is trained.

    Args:
        split: validation runs have the sweep's steps, test runs the task's.
        name: for the label.
        multipliers: factor to what its rate is multiplied with; those that are 1 or have no such factor are left out.
    """
    used = {factor for factor in multipliers if multipliers[factor] != 1.0 and factor in factors_of(form)}
    settings = {
        **_measured(plan, task, split),
        "form": form.settings(),
        "multipliers": {factor: float(f"{multipliers[factor]:.6g}") for factor in sorted(used)},
        "learning_rate": float(rate),
        "seed": seed,
        "steps": plan.sweep.steps if split == "validation" else task.steps,
        "batch": plan.training.batch,
        "warmup_steps": plan.training.warmup_steps,
        "weight_decay": plan.training.weight_decay,
        "clip": plan.training.clip,
        "start_batches": plan.training.start_batches if "gradient" in (form.start_A, form.start_B) else 0,
        "order": ORDER,
        "max_seq_length": task.max_seq_length,
        "max_chars": task.max_chars,
    }
    rates = f"lr{rate:g}-" if split == "validation" else ""
    return Cell(f"{task.name}-{name}-{rates}s{seed}", settings)


def factors_of(form: Form) -> set[str]:
    """The factors that a form trains."""
    found = {name for name, trained in (("A", form.train_A), ("B", form.train_B)) if trained}
    found |= {"none": set(), "diagonal": {"u"}, "full": {"R"}}[form.core]
    found |= set() if form.v == "none" else {"v", "V"} if form.v == "directions" else {"v"}
    return found


def _measured(plan: Plan, task: Task, split: str) -> dict[str, Any]:
    return {
        "harness": _HARNESS,
        "task": task.name,
        "base": plan.base,
        "precision": "bf16",
        "split": split,
        "items": plan.sweep.items if split == "validation" else task.items,
        "metrics": [LOSS, *([ACCURACY] if task.choice and split == "test" else [])],
    }
