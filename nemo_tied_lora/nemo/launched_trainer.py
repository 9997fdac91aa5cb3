# SPDX-License-Identifier: Apache-2.0
"""NeMo's trainer on ranks that a launcher has started. Their numbers come from torch's variables, and progress is readable."""

from __future__ import annotations

import os
import sys
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ProgressBar
from lightning.pytorch.plugins.environments import LightningEnvironment, TorchElasticEnvironment
from nemo.collections.nlp.parts.megatron_trainer_builder import MegatronLMPPTrainerBuilder
from nemo.collections.nlp.parts.nlp_overrides import CustomProgressBar

from nemo_tied_lora.errors import ConfigError
from nemo_tied_lora.platform import prepare
from nemo_tied_lora.progress import SoOften, shows_bars
from nemo_tied_lora.tables import duration

__all__ = ["LaunchedTrainerBuilder", "ProgressLines", "RankEnvironment"]


class RankEnvironment(TorchElasticEnvironment):
    """Reads RANK, WORLD_SIZE and LOCAL_RANK, which are set and checked on every rank.

    Lightning would take SLURM's variables for its own wherever SLURM runs. They are another program's if torchrun or this
    package has started the ranks inside a task, and Lightning refuses some sets of them that are right.
    """

    def node_rank(self) -> int:
        """The number of this rank's node."""
        return int(os.environ.get("NODE_RANK", os.environ.get("GROUP_RANK", "0")))


class LaunchedTrainerBuilder(MegatronLMPPTrainerBuilder):
    """NeMo's builder with `RankEnvironment`, and with `ProgressLines` in place of the bar where there is no terminal."""

    def create_trainer(self, callbacks: list[Callback] | None = None) -> Trainer:
        """As NeMo's.

        Raises:
            ConfigError: a GPU is asked for where there is none.
        """
        accelerator = self.cfg.trainer.get("accelerator")
        if accelerator in ("gpu", "cuda") and not prepare(nemo=True).gpu:
            fix = "torch finds no GPU on this machine; write auto, which takes a GPU if there is one"
            raise ConfigError([f"trainer.accelerator={accelerator}: {fix}"])
        return super().create_trainer(callbacks)

    def _plugins(self) -> list[Any]:
        plugins = [p for p in super()._plugins() if not isinstance(p, TorchElasticEnvironment)]
        if "RANK" in os.environ:
            return [RankEnvironment(), *plugins]
        alone = self.cfg.trainer.devices == 1 and self.cfg.trainer.num_nodes == 1
        return [LightningEnvironment(), *plugins] if alone else plugins  # in an allocation of several tasks too

    def _callbacks(self, callbacks: list[Callback] | None) -> list[Callback]:
        found = super()._callbacks(callbacks)
        if shows_bars(sys.stdout):
            return found
        return [ProgressLines() if isinstance(one, CustomProgressBar) else one for one in found]


class ProgressLines(ProgressBar):
    """Prints a line every 30 s, at the first and at the last step, and after each validation. On rank 0.

    A subclass of Lightning's `ProgressBar`, because Lightning adds its own bar if it finds none.
    """

    def __init__(self) -> None:
        super().__init__()
        self._due, self._shown = SoOften(), False

    def disable(self) -> None:
        """Lightning calls it on all ranks but rank 0, which alone prints anyway."""

    def enable(self) -> None:
        """There is nothing to switch on."""

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if trainer.global_rank == 0 and (self._due() or trainer.global_step >= trainer.max_steps):
            loss = _metric(trainer, "reduced_train_loss", "loss")
            left = _time_left(trainer) if self._shown else ""  # the first step is slower than the others
            self._shown = True
            _say(f"step {trainer.global_step} of {trainer.max_steps}{loss}{left}")

    def on_validation_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int, *_: Any
    ) -> None:
        if trainer.global_rank == 0 and not trainer.sanity_checking and self._due():
            batches = trainer.num_val_batches
            total = sum(batches) if isinstance(batches, list) else batches
            _say(f"step {trainer.global_step}: validation, batch {batch_idx + 1} of {total}")

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.global_rank == 0 and not trainer.sanity_checking:
            _say(
                f"step {trainer.global_step} of {trainer.max_steps}{_metric(trainer, 'validation_loss', 'validation loss')}"
            )


def _metric(trainer: Trainer, name: str, shown: str) -> str:
    value = trainer.callback_metrics.get(name)
    return "" if value is None else f", {shown} {float(value):.4f}"


def _time_left(trainer: Trainer) -> str:
    seconds = trainer.callback_metrics.get("step_seconds")
    left = trainer.max_steps - trainer.global_step
    return "" if seconds is None or left <= 0 else f", {duration(left * float(seconds))} left"


def _say(line: str) -> None:
    print(line, flush=True)
