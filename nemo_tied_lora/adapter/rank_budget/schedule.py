# SPDX-License-Identifier: Apache-2.0
"""How many entries of u are left after each optimizer step. Imports no torch.

With n entries in the whole model, and t optimizer steps done (AdaLoRA, arXiv 2303.10512, equation 12):

    b(t) = n                                                         t <= start
    b(t) = target + round((n - target) (1 - (t - start) / (final - start))^3)
    b(t) = target                                                    t >= final

The entries are chosen anew after every `every`-th step from `start` on, and after step `final`. Then the choice is fixed.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from nemo_tied_lora.adapter.shapes import LinearShape
from nemo_tied_lora.config import RankBudget
from nemo_tied_lora.errors import ConfigError, Problems

__all__ = ["BudgetSchedule", "length_problems"]


@dataclass(frozen=True, kw_only=True)
class BudgetSchedule:
    """The budget of one run. It does not change when the run is resumed with another number of steps."""

    entries: int
    """n: u's entries in the whole model."""
    target: int
    """The entries that are left at the end."""
    start: int
    """The optimizer steps before the first one that may prune."""
    final: int
    """The optimizer step from which the choice is fixed."""
    every: int

    @classmethod
    def of_run(cls, budget: RankBudget, rank: int, shapes: Iterable[LinearShape], max_steps: int) -> BudgetSchedule:
        """The schedule of a run of `max_steps` optimizer steps, which decide what the configuration leaves open.

        Args:
            shapes: of each group, whole, with the layers of the whole model.

        Raises:
            ConfigError: the run is too short.
        """
        Problems(length_problems(budget, max_steps)).raise_if_any()
        start, final = _steps(budget, max_steps)
        linears = sum(shape.num_linears for shape in shapes)
        entries, target = linears * rank, min(round(budget.target_rank * linears), linears * rank)
        return cls(entries=entries, target=target, start=start, final=final, every=budget.every)

    def budget(self, done: int) -> int:
        """b(t): the entries that stay after `done` optimizer steps."""
        if done <= self.start:
            return self.entries
        if done >= self.final:
            return self.target
        left = 1 - (done - self.start) / (self.final - self.start)
        return self.target + round((self.entries - self.target) * left**3)

    def chooses(self, done: int) -> bool:
        """Whether the entries are chosen after the `done`-th optimizer step."""
        return self.start < done <= self.final and (done % self.every == 0 or done == self.final)

    def is_fixed(self, done: int) -> bool:
        """Whether the choice no longer changes."""
        return done >= self.final

    def as_dict(self) -> dict[str, int]:
        """Plain values for JSON."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> BudgetSchedule:
        """The inverse of `as_dict`.

        Raises:
            ConfigError: a key is missing or unknown, or a value is not a whole number.
        """
        names = [field.name for field in dataclasses.fields(cls)]
        if sorted(values) != sorted(names) or not all(type(value) is int for value in values.values()):
            raise ConfigError(
                [f"rank_budget: the schedule {dict(values)!r} does not have the numbers {', '.join(names)}"]
            )
        return cls(**values)


def length_problems(budget: RankBudget, max_steps: int, key: str = "max_steps") -> Iterable[str]:
    """Yields one line if a run of `max_steps` optimizer steps ends before its budget is reached."""
    _, final = _steps(budget, max_steps)
    if final <= max_steps:
        return
    ends = f"{key}={max_steps} ends the run before the budget is reached"
    if budget.final_step is not None:
        yield f"rank_budget.final_step={budget.final_step}: {ends}; set it to at most {max_steps}"
    elif budget.start_step is not None and max_steps > 1:
        yield f"rank_budget.start_step={budget.start_step}: {ends}; set it to at most {max_steps - 1}"
    else:
        yield f"rank_budget: {ends}: the first step cannot prune; set {key} to at least 2"


def _steps(budget: RankBudget, max_steps: int) -> tuple[int, int]:
    """start and final, with the defaults for what is None."""
    start = max(1, max_steps // 6) if budget.start_step is None else budget.start_step
    if budget.start_step is None and budget.final_step is not None:
        start = min(start, budget.final_step - 1)
    final = max(start + 1, max_steps - max_steps // 3) if budget.final_step is None else budget.final_step
    return start, final
