# SPDX-License-Identifier: Apache-2.0
"""Runs one rank of a fine-tuning run with Tied-LoRA, or of the pre-training of a small base, with NeMo's trainer."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch.multiprocessing
from lightning.pytorch import Trainer
from nemo.utils import logging
from nemo.utils.exp_manager import exp_manager
from omegaconf import DictConfig, OmegaConf, open_dict

from nemo_tied_lora.adapter.quantized.quantize_base import precision_facts
from nemo_tied_lora.checkpoint.training_checkpoint import is_checkpoint
from nemo_tied_lora.errors import ConfigError
from nemo_tied_lora.files import write_json
from nemo_tied_lora.nemo.checkpoint_strategy import TiedLoraTrainerBuilder
from nemo_tied_lora.nemo.early_answer_check import check_answers_early
from nemo_tied_lora.nemo.model import MegatronGPTTiedLoraModel
from nemo_tied_lora.nemo.parameter_table import base_parameter_count, lora_counts, parameter_table
from nemo_tied_lora.nemo.peft_config import TiedLoraPEFTConfig
from nemo_tied_lora.nemo.process_groups import ensure_process_groups
from nemo_tied_lora.nemo.rank_record import RankRecord, budget_facts, budget_line
from nemo_tied_lora.nemo.restored_base import restore_base
from nemo_tied_lora.nemo.resume_check import check_base, check_settings, record_settings
from nemo_tied_lora.nemo.resuming import launch_kept, remove_leftover_checkpoints, skip_one_validation
from nemo_tied_lora.nemo.run_recorder import RunRecorder, draw_losses, peak_memory_bytes
from nemo_tied_lora.nemo.status_callback import StatusCallback
from nemo_tied_lora.nemo.stop_callback import StopCallback, restore_status_file, stop_as
from nemo_tied_lora.planning.data.data_files import SECTIONS
from nemo_tied_lora.planning.settings.resumed_step import resumed_checkpoints
from nemo_tied_lora.planning.settings.run_length import REMOVED, adjusted_run
from nemo_tied_lora.planning.settings.run_settings import GuardSettings
from nemo_tied_lora.platform import prepare
from nemo_tied_lora.resilience.rank import Rank

__all__ = ["finetune", "pretrain"]


def finetune(cfg: DictConfig, rank: Rank | None = None) -> dict[str, Any]:
    """Trains an adapter on `cfg.model.restore_from_path`; writes its `.nemo`, metrics.json and loss.png.

    All ranks call it. Returns the content of metrics.json, the same on every rank except for what only rank 0 logs.
    Without `rank`, as in a library's use, the run writes no status.json and answers no stop signals.
    """
    trainer, recorder = _start(cfg, rank)
    resumed = [path for path in resumed_checkpoints(cfg) if is_checkpoint(path)]
    if resumed:  # exp_manager moves the files of the run before, so the base is compared first
        model, base = _adapted_model(cfg, trainer, early=False)  # its data are checked when the folder is open
        check_base(model, trainer, resumed)
        folder = _open_folder(cfg, trainer, rank)
    else:  # exp_manager may refuse a logger, and loading a base takes long
        folder = _open_folder(cfg, trainer, rank)
        model, base = _adapted_model(cfg, trainer, early=True)
    _place_data_index(model.cfg.data, folder)
    assert model.tied_lora is not None
    if trainer.global_rank == 0:
        print(parameter_table(model.tied_lora, base), flush=True)
    trainer.fit(model)
    if cfg.model.data.test_ds.file_names is not None:
        trainer.ckpt_path = None  # else a resumed run would load this checkpoint again, then test and save it
        trainer.test(model)
    facts = {
        "adapter": model.tied_lora.config.as_dict(),
        "lr_multipliers": dict(model.lr_multipliers),
        "trained_parameters": sum(model.tied_lora.num_parameters().values()),
        "parameter_table": parameter_table(model.tied_lora, base),
        "lora_parameters": sum(lora_counts(model.tied_lora).values()),
        "base_parameters": base,
        **precision_facts(model._unwrap_model_list()),
        "rank_budget": budget_facts(model.tied_lora),
    }
    line = budget_line(model.tied_lora)
    if line is not None and trainer.global_rank == 0:
        print(line, flush=True)
    return _finish(model, trainer, recorder, Path(cfg.output or folder / "adapter.nemo"), facts, cfg)


def pretrain(cfg: DictConfig, rank: Rank | None = None) -> dict[str, Any]:
    """Trains every parameter of a model built from `cfg.model`; writes the base's `.nemo` and a record beside it."""
    trainer, recorder = _start(cfg, rank)
    folder = _open_folder(cfg, trainer, rank)
    model_cfg = copy.deepcopy(cfg.model)
    OmegaConf.resolve(model_cfg)
    with open_dict(model_cfg):
        model_cfg.precision = cfg.trainer.precision
    model = MegatronGPTTiedLoraModel(model_cfg, trainer)
    model.guards = GuardSettings.from_mapping(cfg.get("guards"))
    ensure_process_groups(trainer)
    _check_vocabulary(model)
    facts = {"trained_parameters": base_parameter_count(model)}
    trainer.fit(model)
    return _finish(model, trainer, recorder, Path(cfg.output or folder / "base.nemo"), facts, cfg)


def _start(cfg: DictConfig, rank: Rank | None) -> tuple[Trainer, RunRecorder]:
    """The trainer. Refuses other settings than those of the checkpoints from which the run resumes."""
    torch.multiprocessing.set_start_method("spawn", force=True)
    _check_packing(cfg)
    _adjust(cfg)
    recorder = RunRecorder()
    callbacks = [] if rank is None else [StatusCallback(rank), StopCallback(rank)]
    trainer = TiedLoraTrainerBuilder(cfg).create_trainer(callbacks=[recorder, RankRecord(), *callbacks])
    if rank is not None:
        stop_as(trainer, rank)
    remove_leftover_checkpoints(cfg)
    check_settings(cfg)
    return trainer, recorder


def _open_folder(cfg: DictConfig, trainer: Trainer, rank: Rank | None) -> Path:
    """The run's folder. exp_manager makes it, moves the files of the run before in it, and finds the checkpoint to resume.

    Rank 0 is first: it moves every file of the folder, and the other ranks' new logs would be among them.
    """
    with nullcontext() if rank is None else rank.rank_0_first("run folder"), launch_kept(cfg):
        folder = Path(exp_manager(trainer, cfg.exp_manager))
    if trainer.ckpt_path is None:  # else the run has checkpoints of its own
        trainer.ckpt_path = cfg.model.get("resume_from_checkpoint")
    if rank is not None:
        restore_status_file(rank)
    skip_one_validation(trainer)
    logging.info(f"run folder: {folder}")
    record_settings(cfg, trainer)
    _place_data_index(cfg.model.data, folder)
    return folder


def _place_data_index(data: DictConfig, folder: Path) -> None:
    """Writes the index of each section's files into the run's folder: the folder of the data may not be writable."""
    for section in (data[name] for name in SECTIONS):
        if section.get("index_mapping_dir") is None:
            with open_dict(section):
                section.index_mapping_dir = str(folder / "data_index")
        if section.get("write_predictions_to_file") and section.get("output_file_path_prefix"):
            Path(section.output_file_path_prefix).parent.mkdir(parents=True, exist_ok=True)  # NeMo fails without it


def _adapted_model(cfg: DictConfig, trainer: Trainer, *, early: bool) -> tuple[MegatronGPTTiedLoraModel, int]:
    """The base with its adapter, new or from a file, on this rank's part of the layout. And the base's parameters.

    Args:
        early: whether to count the answers that do not fit before the base is loaded. It makes the index of the data.
    """
    model_cfg = MegatronGPTTiedLoraModel.merge_cfg_with(cfg.model.restore_from_path, cfg)
    checked = early and check_answers_early(cfg.model.restore_from_path, model_cfg, trainer)
    model = restore_base(cfg.model.restore_from_path, model_cfg, trainer)
    model.answers_checked = checked
    if model.quantized_base is not None and trainer.global_rank == 0:
        print(f"base, on rank 0: {model.quantized_base}", flush=True)
    base = base_parameter_count(model)
    if model_cfg.peft.restore_from_path is not None:
        model.load_adapters(model_cfg.peft.restore_from_path)
    else:
        model.add_adapter(TiedLoraPEFTConfig(model_cfg))
    model.guards = GuardSettings.from_mapping(cfg.get("guards"))
    # By default NeMo samples in validation, so its answers and exact match would differ from run to run.
    model.set_inference_config({"greedy": True})
    return model, base


def _check_packing(cfg: DictConfig) -> None:
    """Raises ConfigError if sequences are packed and this machine cannot keep them apart.

    `planning` has looked whether Transformer Engine is installed. Whether it works is known once torch is imported.
    """
    packed = [name for name in SECTIONS if cfg.model.data[name].get("packed_sequence")]
    machine = prepare(nemo=True)
    if packed and not (machine.gpu and machine.transformer_engine):
        lack = "this machine has no GPU" if not machine.gpu else "it cannot be imported here"
        raise ConfigError(
            [f"model.data.{packed[0]}.packed_sequence=true: needs Transformer Engine's attention, but {lack}"]
        )


def _adjust(cfg: DictConfig) -> None:
    """Replaces what contradicts the length of the run; see `run_length`. Every rank gets the same values."""
    values = adjusted_run(OmegaConf.to_container(cfg, resolve=True)).values  # type: ignore[arg-type]
    with open_dict(cfg):
        for key, value in values.items():
            if value is REMOVED:
                section, _, name = key.rpartition(".")
                del OmegaConf.select(cfg, section)[name]
            else:
                OmegaConf.update(cfg, key, value, force_add=True)


def _check_vocabulary(model: Any) -> None:
    """Raises ConfigError if a token has no row in the embedding: its first batch would end in an index error, or worse."""
    rows, pieces = model.padded_vocab_size, model.tokenizer.vocab_size
    if pieces > rows:
        raise ConfigError([f"model.override_vocab_size: the tokenizer has {pieces} pieces, the embedding {rows} rows"])


def _finish(
    model: Any, trainer: Trainer, recorder: RunRecorder, output: Path, facts: Mapping[str, Any], cfg: DictConfig
) -> dict[str, Any]:
    """Writes the `.nemo`, then the record beside it.

    Raises:
        ConfigError: an adapter's `.nemo` cannot be written. Its checkpoints are kept.
    """
    try:
        model.save_to(str(output))
    except OSError as error:
        if model.tied_lora is None:
            raise
        again = "the newest checkpoint holds the adapter: free some space and type the command again"
        raise ConfigError([f"output={output}: cannot be written: {error}; {again}"]) from error
    summary = {
        **facts,
        "output": str(output),
        "metrics": {name: float(value) for name, value in sorted(trainer.callback_metrics.items())},
        "peak_memory_bytes": peak_memory_bytes(),
        "checkpoints": list(getattr(trainer.strategy, "saves", [])),
        **recorder.summary(),
    }
    if trainer.global_rank == 0:
        write_json(output.with_name("metrics.json"), summary)
        draw_losses(output.with_name("loss.png"), summary, f"{cfg.name}: {cfg.trainer.max_steps} steps")
        print(f"written: {output}, {output.with_name('metrics.json')}, {output.with_name('loss.png')}", flush=True)
    return summary
