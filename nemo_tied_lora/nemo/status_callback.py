# SPDX-License-Identifier: Apache-2.0
"""Reports a run's progress to status.json and to the watchdog."""

from __future__ import annotations

import time
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from nemo_tied_lora.resilience.rank import Rank

__all__ = ["StatusCallback", "saved_checkpoint"]

_SMOOTHING = 0.9


class StatusCallback(Callback):
    """Writes step, loss, tokens per second, time left and the last checkpoint. Add it after the `RunRecorder`."""

    def __init__(self, rank: Rank) -> None:
        self._rank = rank
        self._step_seconds: float | None = None
        self._step_ended: float | None = None

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._step_ended = None
        self._rank.status.update(state="training", step=trainer.global_step, max_steps=trainer.max_steps)
        self._moved(f"step {trainer.global_step}")

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        step, now = trainer.global_step, time.monotonic()
        self._moved(f"step {step}")
        if self._step_ended is not None:
            seconds = now - self._step_ended
            before = self._step_seconds
            self._step_seconds = seconds if before is None else _SMOOTHING * before + (1 - _SMOOTHING) * seconds
        self._step_ended = now
        left = None if self._step_seconds is None else round((trainer.max_steps - step) * self._step_seconds, 1)
        self._rank.status.update(
            state="training", step=step, seconds_left=left, **_logged(trainer), **saved_checkpoint(trainer)
        )

    def on_validation_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int, *_: Any
    ) -> None:
        self._moved(f"validation after step {trainer.global_step}")

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        self._moved(f"saving after step {trainer.global_step}")
        self._rank.status.update(state="saving")

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._moved("after training", watched=False)
        self._rank.status.update(now=True, step=trainer.global_step, **saved_checkpoint(trainer))

    def _moved(self, place: str, *, watched: bool = True) -> None:
        if self._rank.watchdog is not None:
            self._rank.watchdog.moved(place, watched=watched)


def saved_checkpoint(trainer: Trainer) -> dict[str, Any]:
    """The last complete checkpoint and its step, as fields of status.json; empty if there is none."""
    callback: Any = trainer.checkpoint_callback
    path = getattr(callback, "_last_checkpoint_saved", "") if callback is not None else ""
    return {"last_checkpoint": str(path), "saved_step": callback._last_global_step_saved} if path else {}


def _logged(trainer: Trainer) -> dict[str, Any]:
    names = {"loss": "reduced_train_loss", "tokens_per_second": "tokens_per_second"}
    metrics = trainer.callback_metrics
    return {ours: float(metrics[theirs]) for ours, theirs in names.items() if theirs in metrics}
