# SPDX-License-Identifier: Apache-2.0
"""Records a run: logs numbers at each step, and provides the contents of `metrics.json` and `loss.png`."""

from __future__ import annotations

import math
import resource
import sys
import time
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from megatron.core import parallel_state

from nemo_tied_lora.config import FACTORS
from nemo_tied_lora.platform.devices import collective_device
from nemo_tied_lora.plots import picture

__all__ = ["RunRecorder", "draw_losses", "peak_memory_bytes"]


class RunRecorder(Callback):
    """Logs step time and tokens per second; records losses, learning rates, gradient norms and validations.

    Checkpoints hold the history, so the record of a resumed run is complete. Add it before NeMo's checkpoint callback.
    """

    def __init__(self) -> None:
        self.steps: list[dict[str, Any]] = []
        self.validations: list[dict[str, float]] = []
        self.wall_seconds = 0.0
        self._step_started = self._fit_started = 0.0
        self._tokens_before = 0

    def state_dict(self) -> dict[str, Any]:
        return {"steps": self.steps, "validations": self.validations, "wall_seconds": self._elapsed()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        if len(state_dict["steps"]) < len(self.steps):
            return  # at the end NeMo loads the best checkpoint; the record must keep the later steps
        self.steps, self.validations = list(state_dict["steps"]), list(state_dict["validations"])
        self.wall_seconds = state_dict["wall_seconds"]

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._fit_started = time.perf_counter()

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.wall_seconds, self._fit_started = self._elapsed(), 0.0

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        self._step_started, self._tokens_before = time.perf_counter(), getattr(pl_module, "tokens_seen", 0)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        seconds = time.perf_counter() - self._step_started
        replicas = parallel_state.get_data_parallel_world_size()
        tokens = (getattr(pl_module, "tokens_seen", 0) - self._tokens_before) * replicas
        pl_module.log("step_seconds", seconds, rank_zero_only=True, batch_size=1)
        pl_module.log("tokens_per_second", tokens / seconds, prog_bar=True, rank_zero_only=True, batch_size=1)
        rates = {name: name for name in ("lr", *(f"lr_{factor}" for factor in FACTORS))}
        names = {"loss": "reduced_train_loss", **rates, "grad_norm": "grad_norm"}
        found: dict[str, Any] = {
            ours: float(trainer.callback_metrics[n]) for ours, n in names.items() if n in trainer.callback_metrics
        }
        skipped = getattr(pl_module, "skipped", None)
        if skipped is not None:
            found = {name: value for name, value in found.items() if math.isfinite(value)} | {"skipped": skipped.name}
        self.steps.append({"step": trainer.global_step, **found, "seconds": seconds, "tokens": tokens})

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.sanity_checking:
            return
        found = {n: float(v) for n, v in trainer.callback_metrics.items() if n.startswith("validation_")}
        self.validations.append({"step": trainer.global_step, **found})

    def summary(self) -> dict[str, Any]:
        """The record as plain values for metrics.json."""
        tokens, seconds = (sum(step[key] for step in self.steps) for key in ("tokens", "seconds"))
        return {
            "wall_seconds": self._elapsed(),
            "tokens_per_second": tokens / seconds if seconds else None,
            "skipped_steps": sum("skipped" in step for step in self.steps),
            "steps": self.steps,
            "validations": self.validations,
        }

    def _elapsed(self) -> float:
        running = time.perf_counter() - self._fit_started if self._fit_started else 0.0
        return self.wall_seconds + running


def peak_memory_bytes() -> int:
    """The sum over all ranks of each process's peak resident memory: an upper bound for the peak of their sum."""
    unit = 1 if sys.platform == "darwin" else 1024
    peak = torch.tensor(float(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit))
    if torch.distributed.is_initialized():
        peak = peak.to(collective_device())
        torch.distributed.all_reduce(peak)
    return int(peak.item())


def draw_losses(path: Path, summary: dict[str, Any], title: str) -> None:
    """Draws training loss per step, its running mean, and validation loss as a PNG."""
    steps = [(point["step"], point["loss"]) for point in summary["steps"] if point.get("loss", 0) > 0]
    validations = [(p["step"], p["validation_loss"]) for p in summary["validations"] if "validation_loss" in p]
    with picture(path) as axes:
        if steps:
            axes.plot(*zip(*steps, strict=True), color="tab:blue", alpha=0.3, linewidth=1, label="training, each step")
            axes.plot(*zip(*_running_mean(steps), strict=True), color="tab:blue", label="training, running mean")
        if validations:
            axes.plot(*zip(*validations, strict=True), color="tab:orange", marker="o", label="validation")
        axes.set(xlabel="step", ylabel="loss (nats per answer token)", title=title, yscale="log")


def _running_mean(points: list[tuple[float, float]], weight: float = 0.9) -> list[tuple[float, float]]:
    """Exponential running mean of the logarithms, because the axis is logarithmic; corrected for its start."""
    means, total, norm = [], 0.0, 0.0
    for step, value in points:
        total, norm = weight * total + (1 - weight) * math.log(value), weight * norm + (1 - weight)
        means.append((step, math.exp(total / norm)))
    return means
