# SPDX-License-Identifier: Apache-2.0
"""What a resumed run needs of Lightning and NeMo to be the uninterrupted one, beside what a checkpoint holds."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from nemo.utils.exp_manager import SkipResumeTrainingValidationLoop
from nemo.utils.get_rank import is_global_rank_zero
from omegaconf import DictConfig

from nemo_tied_lora.checkpoint import rng_state, training_checkpoint
from nemo_tied_lora.files import write_atomically
from nemo_tied_lora.planning.run_settings import run_folder

__all__ = ["KeepRandomStates", "launch_kept", "settle_checkpoints", "skip_one_validation", "whole_steps"]

_LAUNCH = ("job.sbatch", "config.yaml", "versions.json")


class KeepRandomStates(Callback):
    """Training draws from random streams of its own: what runs between two steps takes nothing from them.

    Validation and data loaders draw too (a loader's seed, say), and a resumed run sets loaders up anew. Each step
    starts from the states that the step before left, so neither shows, and the states of a checkpoint are those of
    its last step, wherever in between it was made.
    """

    def __init__(self) -> None:
        self.states: dict[str, torch.Tensor] | None = None

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        if self.states is not None:
            rng_state.restore(self.states, pl_module.device)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self.states = rng_state.capture(pl_module.device)


def settle_checkpoints(cfg: DictConfig) -> None:
    """Runs before exp_manager looks for a checkpoint to resume from; see `training_checkpoint.remove_leftovers`."""
    run, params = run_folder(cfg), cfg.exp_manager.get("checkpoint_callback_params") or {}
    if run is None:
        return
    checkpoints = Path(params.get("dirpath") or run / "checkpoints")
    if cfg.exp_manager.get("resume_if_exists") and checkpoints.is_dir():
        training_checkpoint.remove_leftovers(checkpoints, first=is_global_rank_zero())


@contextmanager
def launch_kept(cfg: DictConfig) -> Iterator[None]:
    """Around exp_manager, which moves every file of the run's folder into `run_N`: what `tied-lora launch` left stays.

    Its script is what a person submits again after `scancel`.
    """
    run = run_folder(cfg)
    paths = [run / name for name in _LAUNCH] if run is not None and is_global_rank_zero() else []
    contents = {path: path.read_bytes() for path in paths if path.is_file()}
    try:
        yield
    finally:
        for path, content in contents.items():
            write_atomically(path, content)


def skip_one_validation(trainer: Trainer) -> None:
    """After exp_manager: a resumed run leaves out the validation that its checkpoint was made in, and no other."""
    loop = trainer.fit_loop.epoch_loop
    if type(loop) is SkipResumeTrainingValidationLoop:
        loop.__class__ = _SkipOneValidation


class _SkipOneValidation(SkipResumeTrainingValidationLoop):
    """NeMo's loop takes a run for restarting until after its first step, and leaves out that step's validation too."""

    def advance(self, data_fetcher: Any) -> None:
        super().advance(data_fetcher)
        self._restarting = False


def whole_steps(checkpoint: Mapping[str, Any]) -> dict[str, Any]:
    """Lightning's dictionary with its counters as they stand between two steps.

    A checkpoint is made between two optimizer steps, but not always where Lightning has just counted: a callback at a
    step's end comes before "completed", one at the next step's start after "ready". Resumed so, validations would come
    at other steps, and a run that was stopped before its last step would end there.
    """
    fit = dict(checkpoint["loops"]["fit_loop"])
    progress = fit["epoch_loop.batch_progress"]
    begun = progress["total"]["ready"] > progress["total"]["processed"]
    fit["epoch_loop.batch_progress"] = {
        **progress,
        **{span: dict.fromkeys(progress[span], progress[span]["processed"]) for span in ("total", "current")},
        "is_last_batch": progress["is_last_batch"] and not begun,
    }
    fit["epoch_loop.state_dict"] = {
        **fit["epoch_loop.state_dict"],
        "_batches_that_stepped": checkpoint["global_step"],
    }
    return {**checkpoint, "loops": {**checkpoint["loops"], "fit_loop": fit}}
