# SPDX-License-Identifier: Apache-2.0
"""Stopping on a signal: all ranks save after the same step, whichever rank got it."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer

from nemo_tied_lora.nemo.status_callback import StatusCallback, saved_checkpoint
from nemo_tied_lora.resilience.current_run import RankRun, current_run
from nemo_tied_lora.resilience.restarts import Preempted

__all__ = ["StopCallback", "answer_alone", "restore_status_file", "survival_callbacks"]


def survival_callbacks() -> list[Callback]:
    """What a run started by a command of ours needs; nothing in a library's use."""
    run = current_run()
    return [] if run is None else [StatusCallback(run), StopCallback(run)]


def restore_status_file(trainer: Trainer) -> None:
    """After exp_manager, which moves what lay in the run's folder out of the way: the status file is there again.

    The groups that NeMo makes get the configured limit, `watchdog.stuck_s`, in place of Lightning's 30 minutes.
    """
    run = current_run()
    if run is not None:
        run.status.update(now=True)
        answer_alone(trainer)
        if run.stuck_s:
            trainer.strategy._timeout = timedelta(seconds=run.stuck_s)


def answer_alone(trainer: Trainer) -> None:
    """Leaves SIGTERM to `StopCallback`.

    Lightning would end the rank that got it after its step: alone, without a checkpoint, with exit code 0.
    """
    connector: Any = trainer._signal_connector
    connector._sigterm_notifier_fn = lambda number, frame: None


class StopCallback(Callback):
    """Asks at the start of each step, with one all-reduce of one number, whether any rank has been told to stop.

    Then, and not at the end of the step before, that step's validation is done and Lightning's counters are what a
    resumed run expects.

    Raises:
        Preempted: on every rank, after the checkpoint is written.
    """

    def __init__(self, run: RankRun) -> None:
        self._run = run

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._run.can_save = True

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._run.can_save = False

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        if not _any_rank(self._run.asked_to_stop is not None, pl_module.device):
            return
        step = trainer.global_step
        _save_last(trainer, step)
        self._run.status.update(now=True, **saved_checkpoint(trainer))
        raise Preempted(
            f"asked to stop: saved after step {step} of {trainer.max_steps}; the same command goes on from there"
        )


def _any_rank(asked: bool, device: torch.device) -> bool:
    if not torch.distributed.is_initialized():
        return asked
    flag = torch.tensor(int(asked), dtype=torch.int32, device=device)
    torch.distributed.all_reduce(flag, op=torch.distributed.ReduceOp.MAX)
    return bool(flag.item())


def _save_last(trainer: Trainer, step: int) -> None:
    """The `-last` checkpoint that resuming looks for, unless the one that is there is of this step."""
    callback: Any = trainer.checkpoint_callback
    if callback is None or step == 0:
        return
    of_last = saved_checkpoint(trainer)
    if of_last.get("saved_step") == step and "last" in of_last["last_checkpoint"]:
        return
    callback._save_last_checkpoint(trainer, callback._monitor_candidates(trainer))
