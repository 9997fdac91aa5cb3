# SPDX-License-Identifier: Apache-2.0
"""Guards in NeMo's training loop: they find replicas that drift apart and gradients that are not finite."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Iterator
from typing import Any

from nemo.utils import logging
from torch import nn

from nemo_tied_lora.adapter.injected_adapter import Adapter
from nemo_tied_lora.adapter.nonfinite_grads import NonfiniteGradient, find_nonfinite
from nemo_tied_lora.adapter.replica_check import check_ties
from nemo_tied_lora.errors import TrainingStopped
from nemo_tied_lora.planning.settings.run_settings import MOST_SKIPPED_IN_A_ROW, GuardSettings

__all__ = ["GuardedTrainingMixin"]


class GuardedTrainingMixin:
    """A mixin in front of a NeMo Megatron model. All guards are on by default; set `guards` before the run to change that.

    Tie guard: after every `tie_guard_every_n_steps`-th step and before each checkpoint, all ranks compare the tensors
    that they share (`replica_check.check_ties`). A difference raises on every rank, before anything is written.

    Gradients: after NeMo's `training_step`, gradients are summed over every group, in O1, in O2 and with
    `mcore_distributed_optim`. Lightning then unscales them (float16), clips, and steps. The guard checks them all
    before that. It is off while float16's loss scaler is on: the scaler overflows on purpose to find its scale, and
    skips those steps and the schedule on all ranks.
    """

    guards: GuardSettings = GuardSettings()
    tied_lora: Adapter | None = None
    skipped: NonfiniteGradient | None = None
    """The reason why the last step was skipped; None if it was not."""
    _skipped_in_a_row: int = 0

    def optimizer_step(self, epoch: int, batch_idx: int, optimizer: Any, optimizer_closure: Callable[[], Any]) -> None:
        """Lightning's hook: runs forward and backward, checks the gradients, then steps or skips the step.

        A skipped step changes no parameter, no moment and no step count, on any rank.

        Raises:
            TrainingStopped: a gradient is not finite, and the policy is to stop, or too many steps in a row were
                skipped. Raised on every rank.
        """
        loss = optimizer_closure()
        self.skipped = None if self._has_loss_scaler() else find_nonfinite(self._trained())
        if self.skipped is None:
            self._skipped_in_a_row = 0
            super().optimizer_step(epoch, batch_idx, optimizer, lambda: loss)  # type: ignore[misc]
            return
        self._skipped_in_a_row += 1
        step = self.trainer.global_step + 1  # type: ignore[attr-defined]
        if self.guards.nonfinite_gradients == "stop":
            remedy = "guards.nonfinite_gradients=skip skips such steps; a lower learning rate may avoid them"
            raise TrainingStopped(f"step {step}: {self.skipped}. {remedy}")
        if self._skipped_in_a_row >= MOST_SKIPPED_IN_A_ROW:
            raise TrainingStopped(f"step {step}: {self._skipped_in_a_row} steps in a row skipped: {self.skipped}")
        logging.warning(f"step {step} is skipped: {self.skipped}")
        if self.trainer.global_rank == 0:  # type: ignore[attr-defined]
            print(f"step {step} is skipped: {self.skipped}", file=sys.stderr, flush=True)

    def lr_scheduler_step(self, scheduler: Any, metric: Any) -> None:
        """Lightning's hook: a skipped step does not advance the schedule, as in NeMo's own handling of float16."""
        if self.skipped is None:
            super().lr_scheduler_step(scheduler, metric)  # type: ignore[misc]

    def on_train_batch_end(self, *args: Any, **kwargs: Any) -> None:
        """Lightning's hook: runs the tie guard every `tie_guard_every_n_steps` steps."""
        super().on_train_batch_end(*args, **kwargs)  # type: ignore[misc]
        every, step = self.guards.tie_guard_every_n_steps, self.trainer.global_step  # type: ignore[attr-defined]
        if every and step % every == 0:
            self._compare_replicas(f"after step {step}: ")

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Lightning's hook before a checkpoint is written: runs the tie guard."""
        self._compare_replicas(f"before the checkpoint of step {self.trainer.global_step}: ")  # type: ignore[attr-defined]
        super().on_save_checkpoint(checkpoint)  # type: ignore[misc]

    def _compare_replicas(self, when: str) -> None:
        if self.tied_lora is not None and self.guards.tie_guard_every_n_steps:
            check_ties(self.tied_lora, when)

    def _has_loss_scaler(self) -> bool:
        scaler = getattr(self.trainer.precision_plugin, "scaler", None)  # type: ignore[attr-defined]
        return scaler is not None and scaler.is_enabled()

    def _trained(self) -> Iterator[tuple[str, nn.Parameter]]:
        if self.tied_lora is not None:
            yield from self.tied_lora.named_parameters()
            return
        for chunk in self.get_model_module_list():  # type: ignore[attr-defined]
            layers = getattr(getattr(chunk, "decoder", None), "layers", None)
            first = layers[0].layer_number - 1 if layers else 0
            for name, parameter in chunk.named_parameters():
                if parameter.requires_grad:
                    yield _with_global_layer(name, first), parameter


def _with_global_layer(name: str, first: int) -> str:
    """The name with the layer's global number: "decoder.layers.2.mlp" on a stage from layer 4 is layer 6."""
    return re.sub(r"^(decoder\.layers\.)(\d+)", lambda match: f"{match[1]}{int(match[2]) + first}", name)
