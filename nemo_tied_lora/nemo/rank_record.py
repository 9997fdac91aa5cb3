# SPDX-License-Identifier: Apache-2.0
"""Records what a rank budget leaves: in TensorBoard and the other loggers, in metrics.json, and in a line at the end."""

from __future__ import annotations

from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from nemo_tied_lora.adapter.injected_adapter import Adapter

__all__ = ["RankRecord", "budget_facts", "budget_line"]


class RankRecord(Callback):
    """Logs the rank of every linear, as "rank/layers.7.linear_qkv", and their mean, whenever entries were chosen anew."""

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        adapter = getattr(pl_module, "tied_lora", None)
        if adapter is None or adapter.pruning is None or adapter.pruning.schedule is None:
            return
        first = trainer.global_step == 1
        if getattr(pl_module, "skipped", None) is None and (
            first or adapter.pruning.schedule.chooses(adapter.pruning.done)
        ):
            ranks = adapter.ranks()
            numbers = {"rank/mean": sum(ranks.values()) / len(ranks)} | {
                f"rank/{name}": n for name, n in ranks.items()
            }
            for logger in trainer.loggers:  # not with `log`: these are not metrics of the run
                logger.log_metrics({name: float(number) for name, number in numbers.items()}, step=trainer.global_step)


def budget_facts(adapter: Adapter) -> dict[str, Any] | None:
    """The budget's part of metrics.json: its schedule, and the ranks of the adapter that is saved. None without one."""
    if adapter.pruning is None:
        return None
    ranks = adapter.ranks()
    schedule = adapter.pruning.schedule
    return {
        "schedule": None if schedule is None else schedule.as_dict(),
        "steps_observed": adapter.pruning.done,
        "mean_rank": sum(ranks.values()) / len(ranks),
        "ranks": ranks,
    }


def budget_line(adapter: Adapter) -> str | None:
    """A line for the end of a run. None without a budget."""
    facts = budget_facts(adapter)
    if facts is None:
        return None
    ranks = facts["ranks"].values()
    found = f"ranks {min(ranks)} to {max(ranks)}, mean {facts['mean_rank']:.2f} of {adapter.config.rank}"
    plan = facts["schedule"]
    if plan is not None and sum(ranks) > plan["target"]:
        mean = plan["target"] / len(ranks)
        return (
            f"rank budget: {found}; not yet {mean:.2f}: the adapter is that of step {facts['steps_observed']}, and the budget is "
            f"reached at step {plan['final']}"
        )
    return f"rank budget: {found}"
