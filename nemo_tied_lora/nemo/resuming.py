# SPDX-License-Identifier: Apache-2.0
"""Makes a resumed run equal to an uninterrupted one where Lightning and NeMo would not: random states, validations,
counters, and files that exp_manager moves."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from nemo.utils.exp_manager import SkipResumeTrainingValidationLoop
from nemo.utils.get_rank import is_global_rank_zero
from omegaconf import DictConfig

from nemo_tied_lora.checkpoint import rng_state, training_checkpoint
from nemo_tied_lora.files import write_atomically
from nemo_tied_lora.planning.settings.run_settings import checkpoint_folder, run_folder

__all__ = ["KeepRandomStates", "launch_kept", "remove_leftover_checkpoints", "skip_one_validation", "whole_steps"]

_LAUNCH = ("job.sbatch", "config.yaml", "versions.json")


class KeepRandomStates(Callback):
    """Keeps the random states of training separate from anything that runs between two steps.

    Validation and data loaders draw random numbers too (for a loader's seed, for example), and a resumed run builds
    its loaders again. Here each step starts from the states at the end of the previous step, so these draws have no
    effect. A checkpoint holds the states of its last step, whenever it was written.
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


def remove_leftover_checkpoints(cfg: DictConfig) -> None:
    """Removes leftovers of a killed run (see `training_checkpoint.remove_leftovers`). Call it before exp_manager."""
    checkpoints = checkpoint_folder(cfg)
    if checkpoints is not None and cfg.exp_manager.get("resume_if_exists") and checkpoints.is_dir():
        training_checkpoint.remove_leftovers(checkpoints, first=is_global_rank_zero())


@contextmanager
def launch_kept(cfg: DictConfig) -> Iterator[None]:
    """Keeps the files of `tied-lora launch` in the run's folder. Put it around exp_manager.

    When a run resumes, exp_manager moves every file of its folder into `run_N`. But after `scancel` a user submits the
    job script of the folder again.
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
    """A resumed run skips only the validation in which its checkpoint was written. Call it after exp_manager."""
    loop = trainer.fit_loop.epoch_loop
    if type(loop) is SkipResumeTrainingValidationLoop:
        loop.__class__ = _SkipOneValidation


class _SkipOneValidation(SkipResumeTrainingValidationLoop):
    """Ends NeMo's `_restarting` state after a step: NeMo keeps it for the first step, and skips its validation too."""

    def advance(self, data_fetcher: Any) -> None:
        super().advance(data_fetcher)
        self._restarting = False


def whole_steps(checkpoint: Mapping[str, Any]) -> dict[str, Any]:
    """Returns Lightning's dictionary with the counters that it has between two steps.

    A checkpoint is written between two optimizer steps, but Lightning's counters may be out of step then: a callback
    at the end of a step runs before "completed" counts, one at the next step's start runs after "ready" counts. With
    such counters a resumed run would validate at other steps, and a run stopped before its last step would end.
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
