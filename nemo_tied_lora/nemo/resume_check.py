# SPDX-License-Identifier: Apache-2.0
"""Refuses to resume a run with other settings than those of its checkpoints, or on another base."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from lightning.pytorch import Trainer
from omegaconf import DictConfig, OmegaConf

from nemo_tied_lora.checkpoint.checkpoint_to_adapter import differences
from nemo_tied_lora.checkpoint.training_checkpoint import read_description
from nemo_tied_lora.errors import ConfigError, Problems
from nemo_tied_lora.files import write_json
from nemo_tied_lora.planning.base_config import adapter_section
from nemo_tied_lora.planning.nemo_model_config import recorded_config
from nemo_tied_lora.planning.settings.base_quantization import BaseQuantization
from nemo_tied_lora.planning.settings.factor_rates import resolved_multipliers
from nemo_tied_lora.planning.settings.resumed_step import resumed_checkpoints
from nemo_tied_lora.planning.settings.run_settings import checkpoint_folder

__all__ = ["check_base", "check_settings", "record_settings", "settings_of"]

_RECORD = "settings.json"  # in the checkpoints' folder, which exp_manager leaves alone

# Settings that do not affect what is learned. They may change when a run resumes.
_FREE = (
    "tensor_model_parallel_size",
    "pipeline_model_parallel_size",
    "context_parallel_size",
    "sequence_parallel",
    "micro_batch_size",
    "gradient_as_bucket_view",
    "activations_checkpoint_granularity",
    "activations_checkpoint_method",
    "activations_checkpoint_num_layers",
    "activations_checkpoint_layers_per_pipeline",
    "resume_from_checkpoint",
    "num_workers",
    "memmap_workers",
    "pin_memory",
    "index_mapping_dir",
    "write_predictions_to_file",
    "output_file_path_prefix",
)
_FREE_NAMES = (
    "model.data.test_ds",
    "model.restore_from_path",  # only a path; the checkpoint identifies the base by its fingerprint
)
_OF_THE_TRAINER = ("precision", "gradient_clip_val")


def check_settings(cfg: DictConfig) -> None:
    """Compares the settings with those of the checkpoints from which the run would resume.

    Layout, micro-batch size, recomputation and the number of steps may change. Call it before exp_manager, which moves
    the files of a resumed run's folder, its adapter among them.

    Raises:
        ConfigError: lists each setting that differs.
    """
    folder = checkpoint_folder(cfg)
    if folder is None or not (folder / _RECORD).exists():
        return
    if not any(path.resolve().is_relative_to(folder.resolve()) for path in resumed_checkpoints(cfg)):
        return
    saved, settings = json.loads((folder / _RECORD).read_text()), settings_of(cfg)
    fix = "undo the change, or set name= or exp_manager.explicit_log_dir= to another folder"
    problems = [
        f"{key}={settings.get(key)!r}: the checkpoints in {folder} were made with {saved.get(key)!r}; {fix}"
        for key in sorted({*saved, *settings})
        if saved.get(key) != settings.get(key)
    ]
    if problems:
        raise ConfigError(problems)


def check_base(model: Any, trainer: Trainer, checkpoints: Sequence[Path]) -> None:
    """Compares base and adapter of a model with those of the checkpoints from which the run would resume.

    All ranks call it, before exp_manager. The base's fingerprint, which reads all weights, is kept for the checkpoints to
    come.

    Raises:
        ConfigError: on every rank, with each difference; or a checkpoint is damaged.
    """
    strategy: Any = trainer.strategy
    described = strategy.describe(model)
    Problems(
        line for path in checkpoints for line in differences(path, read_description(path), described)
    ).raise_if_any()


def record_settings(cfg: DictConfig, trainer: Trainer) -> None:
    """Writes the settings of a new run beside its checkpoints. Call it after exp_manager."""
    callback: Any = trainer.checkpoint_callback
    if callback is None or trainer.global_rank != 0:
        return
    folder = Path(callback.dirpath)
    if trainer.ckpt_path is None or not Path(trainer.ckpt_path).resolve().is_relative_to(folder.resolve()):
        write_json(folder / _RECORD, settings_of(cfg))


def settings_of(cfg: DictConfig) -> dict[str, Any]:
    """The settings that a resumed run must share, by dotted key: the section `model` and some keys of the trainer."""
    model: Any = OmegaConf.to_container(cfg.model, resolve=True)
    quantization = BaseQuantization.from_setting(model.pop("base_quantization", None))
    if quantization is not None:  # one name for each way to write it; a run from before the key has none
        model["base_quantization"] = quantization.precision
    _resolve_multipliers(model)
    trainer = {key: cfg.trainer.get(key) for key in _OF_THE_TRAINER}
    return dict(_flat(json.loads(json.dumps({"model": model, "trainer": trainer}))))


def _resolve_multipliers(model: dict[str, Any]) -> None:
    """Replaces `optim.lr_multipliers` by those that are not 1: a default of another release is a change."""
    optim, peft = model.get("optim") or {}, model.get("peft") or {}
    if peft.get("peft_scheme") == "tied_lora":
        start = peft.get("restore_from_path")
        config = adapter_section(peft) if start is None else recorded_config(start)
        multipliers = resolved_multipliers({"model": model}, config)
        optim.pop("lr_multipliers", None)
        if multipliers:
            optim["lr_multipliers"] = multipliers


def _flat(section: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in section.items():
        name = f"{prefix}{key}"
        if key in _FREE or name in _FREE_NAMES:
            continue
        if isinstance(value, Mapping) and value:
            yield from _flat(value, f"{name}.")
        else:
            yield name, value
