# SPDX-License-Identifier: Apache-2.0
"""Megatron's process groups, outside a `Trainer.fit`."""

from __future__ import annotations

from lightning.pytorch import Trainer
from megatron.core import parallel_state

__all__ = ["ensure_process_groups"]


def ensure_process_groups(trainer: Trainer) -> None:
    """Sets the groups up as NeMo's own `generate` does, where restoring the model has not."""
    if parallel_state.is_initialized():
        return
    if trainer.strategy.launcher is not None:
        trainer.strategy.launcher.launch(_nothing, trainer=trainer)
    trainer.strategy.setup_environment()


def _nothing() -> None:
    """The launcher starts processes for a function; there is none to run."""
