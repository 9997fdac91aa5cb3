# SPDX-License-Identifier: Apache-2.0
"""Stops a run on a signal: all ranks save after the same step, no matter which rank got the signal."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer

from nemo_tied_lora.nemo.status_callback import saved_checkpoint
from nemo_tied_lora.resilience.rank import Rank
from nemo_tied_lora.resilience.restarts import Preempted

__all__ = ["StopCallback", "answer_alone", "restore_status_file", "stop_as"]


def restore_status_file(rank: Rank) -> None:
    """Writes the status file again, after exp_manager has moved it away. Other packages' output goes to the run's folder."""
    rank.status.update(now=True)
    rank.other_output.keep_in(rank.status.folder)


def stop_as(trainer: Trainer, rank: Rank) -> None:
    """Sets how this run stops, before its process groups exist.

    Only `StopCallback` answers SIGTERM. NeMo's process groups get the limit `watchdog.stuck_s`, not Lightning's 30 min.
    """
    answer_alone(trainer)
    if rank.stuck_s:
        trainer.strategy._timeout = timedelta(seconds=rank.stuck_s)


def answer_alone(trainer: Trainer) -> None:
    """Switches Lightning's answer to SIGTERM off, so that only `StopCallback` answers.

    Lightning would end only the rank that got the signal, after its step, without a checkpoint, with exit code 0.
    """
    connector: Any = trainer._signal_connector
    connector._sigterm_notifier_fn = lambda number, frame: None


class StopCallback(Callback):
    """At the start of each step, checks with an all-reduce of one number whether any rank got a stop signal.

    The check is not at the end of the step before, because at the start that step's validation is done and Lightning's
    counters are those that a resumed run expects.

    Raises:
        Preempted: on every rank, after the checkpoint is written.
    """

    def __init__(self, rank: Rank) -> None:
        self._rank = rank

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._rank.can_save = True

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._rank.can_save = False

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        if not _any_rank(self._rank.asked_to_stop is not None, pl_module.device):
            return
        step = trainer.global_step
        _save_last(trainer, step)
        self._rank.status.update(now=True, **saved_checkpoint(trainer))
        raise Preempted(
            f"asked to stop: saved after step {step} of {trainer.max_steps}; the same command resumes from there"
        )


def _any_rank(asked: bool, device: torch.device) -> bool:
    if not torch.distributed.is_initialized():
        return asked
    flag = torch.tensor(int(asked), dtype=torch.int32, device=device)
    torch.distributed.all_reduce(flag, op=torch.distributed.ReduceOp.MAX)
    return bool(flag.item())


def _save_last(trainer: Trainer, step: int) -> None:
    """Writes the `-last` checkpoint that a resumed run looks for, unless there is one of this step already."""
    callback: Any = trainer.checkpoint_callback
    if callback is None or step == 0:
        return
    of_last = saved_checkpoint(trainer)
    if of_last.get("saved_step") == step and "last" in of_last["last_checkpoint"]:
        return
    callback._save_last_checkpoint(trainer, callback._monitor_candidates(trainer))
