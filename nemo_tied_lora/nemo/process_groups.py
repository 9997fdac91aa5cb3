# SPDX-License-Identifier: Apache-2.0
"""Sets up Megatron's process groups outside `Trainer.fit`."""

from __future__ import annotations

from lightning.pytorch import Trainer
from megatron.core import parallel_state

__all__ = ["ensure_process_groups"]


def ensure_process_groups(trainer: Trainer) -> None:
    """Sets up the process groups, as NeMo's own `generate` does, unless restoring the model has already done it."""
    if parallel_state.is_initialized():
        return
    if trainer.strategy.launcher is not None:
        trainer.strategy.launcher.launch(lambda: None, trainer=trainer)  # it wants a function; there is none to run
    trainer.strategy.setup_environment()
