# SPDX-License-Identifier: Apache-2.0
"""One run of a study: `tied-lora finetune`, then `tied-lora evaluate`, then its result."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

from nemo_tied_lora.commands.study.cells import SWEEP, Cell
from nemo_tied_lora.commands.study.commands import CommandFailed, Commands
from nemo_tied_lora.commands.study.measured import measured
from nemo_tied_lora.commands.study.plan import Study
from nemo_tied_lora.commands.study.results import write_result
from nemo_tied_lora.commands.study.task_files import TaskFiles
from nemo_tied_lora.config import PRESETS
from nemo_tied_lora.errors import ConfigError
from nemo_tied_lora.files import write_atomically, write_json
from nemo_tied_lora.planning.nemo_model_config import nemo_config
from nemo_tied_lora.planning.versions import installed_version
from nemo_tied_lora.resilience.rank import STOPPED
from nemo_tied_lora.tasks.training_order import file_lines, training_items

__all__ = ["evaluate_arguments", "finetune_arguments", "folder_of", "run_cell"]

_NOT_FINITE = "holds NaN or infinity"
"""What `tied-lora finetune` says when a guard stops a run whose gradients are not finite."""
_ITEMS = "train.jsonl"
"""The training items of a run, in its folder."""
_PACKAGES = ("nemo_tied_lora", "nemo_toolkit", "megatron-core", "torch", "sacrebleu", "rouge-score")


def folder_of(study: Study, cell: Cell) -> Path:
    """Where a run keeps its log, its checkpoints and its adapter."""
    return Path(study.folder, "runs", f"{cell.label}-{cell.key}")


def finetune_arguments(study: Study, cell: Cell, files: TaskFiles) -> list[str]:
    """The arguments of `tied-lora finetune` for a run."""
    settings, place = cell.settings, folder_of(study, cell)
    steps, trained = settings["steps"], PRESETS[settings["preset"]]["trained"]
    return [
        "finetune",
        *files.words,
        f"model.data.train_ds.file_names=[{place / _ITEMS}]",
        "model.data.train_ds.shuffle=false",
        f"preset={settings['preset']}",
        "layout=single",
        f"model.restore_from_path={study.base.path}",
        f"output={place / 'adapter.nemo'}",
        f"exp_manager.explicit_log_dir={place / 'training'}",
        "exp_manager.create_tensorboard_logger=false",
        "verbose=false",
        f"model.peft.tied_lora.rank={settings['rank']}",
        f"model.peft.tied_lora.targets=[{','.join(settings['targets'])}]",
        f"model.peft.tied_lora.seed={settings['seed']}",
        "model.peft.tied_lora.dtype=float32",
        f"model.seed={settings['seed']}",
        f"trainer.precision={settings['precision']}",
        "trainer.enable_progress_bar=false",
        f"trainer.max_steps={steps}",
        f"trainer.val_check_interval={-(-steps // study.training.checkpoints)}",
        f"trainer.limit_val_batches={study.training.validation_batches}",
        f"model.global_batch_size={settings['batch']}",
        f"model.micro_batch_size={settings['micro_batch']}",
        "model.data.train_ds.pin_memory=false",
        "model.data.validation_ds.pin_memory=false",
        f"model.optim.lr={settings['learning_rate']}",
        f"model.optim.lr_multipliers={{{', '.join(f'{factor}: 1' for factor in trained)}}}",
        f"model.optim.weight_decay={settings['weight_decay']}",
        f"model.optim.sched.warmup_steps={settings['warmup_steps']}",
        *_held(cell),
        *settings["overrides"],
    ]


def evaluate_arguments(study: Study, cell: Cell, files: TaskFiles) -> list[str]:
    """The arguments of `tied-lora evaluate` for a run."""
    place = folder_of(study, cell)
    adapter = "null" if cell.is_base else str(place / "adapter.nemo")
    return [
        "evaluate",
        *files.words,
        f"base={study.base.path}",
        f"adapter={adapter}",
        "layout=single",
        f"split={cell.settings['split']}",
        *(["task.metrics=[answer_loss]"] if cell.phase == SWEEP else []),
        f"output={place / 'evaluation'}",
        "resamples=100",  # the page draws its own
        f"trainer.precision={cell.settings['precision']}",
        *_held(cell),
    ]


def _held(cell: Cell) -> list[str]:
    return [] if cell.quantization is None else [f"model.base_quantization={cell.quantization}"]


def run_cell(study: Study, cell: Cell, files: TaskFiles, commands: Commands, claim: int, keep_adapter: bool) -> Path:
    """Runs what is left of a run, and writes its result. A run that was killed continues.

    Returns:
        The result's file.

    Raises:
        CommandFailed: training or evaluation failed, other than by diverging.
        Stopped: the commands were asked to stop.
    """
    place = folder_of(study, cell)
    _begin(place, files.checksums)
    training = {} if cell.is_base else _train(study, cell, files, commands, claim)
    values: dict[str, Any] = {"data": _checksums(cell, files), "versions": _versions()}
    if training.get("diverged"):
        values |= {"scores": {}, "items": {"count": 0}, "statistics": {}}
    else:
        seconds = commands.run(evaluate_arguments(study, cell, files), place / "evaluate.log", claim)
        values |= measured(place / "evaluation", files.items[cell.settings["split"]], cell.settings, files.marker)
        training = {**training, "seconds": {**training.get("seconds", {}), "evaluate": round(seconds, 1)}}
    values |= {"diverged": False, "trained_parameters": 0, "base": None, "training_loss": None, **training}
    path = write_result(Path(study.results), cell, values)
    _clean(place, keep_adapter)
    return path


def _begin(place: Path, checksums: Mapping[str, str]) -> None:
    """Removes what a run with other data has left in the folder."""
    record = place / "data.json"
    if record.exists() and json.loads(record.read_text()) != checksums:
        for name in ("training", "evaluation"):
            shutil.rmtree(place / name, ignore_errors=True)
        for name in (_ITEMS, "trained.json", "adapter.nemo"):
            (place / name).unlink(missing_ok=True)
    write_json(record, checksums)


def _train(study: Study, cell: Cell, files: TaskFiles, commands: Commands, claim: int) -> dict[str, Any]:
    """Trains unless that is done. Returns what the training adds to the result."""
    place = folder_of(study, cell)
    record = place / "trained.json"
    if record.exists():
        return json.loads(record.read_text())
    _write_items(place / _ITEMS, cell.settings, files.train)
    try:
        seconds = commands.run(finetune_arguments(study, cell, files), place / "finetune.log", claim)
    except CommandFailed as failure:
        if failure.code != STOPPED or _NOT_FINITE not in failure.log.read_text(errors="replace"):
            raise
        values: dict[str, Any] = {"diverged": True, "seconds": {}}
    else:
        metrics = json.loads((place / "metrics.json").read_text())
        values = {
            "trained_parameters": metrics["trained_parameters"],
            "lora_parameters": metrics["lora_parameters"],
            "base_parameters": metrics["base_parameters"],
            "base": _fingerprint(study, place / "adapter.nemo"),
            "training_loss": _losses(metrics["steps"]),
            "seconds": {"train": round(seconds, 1)},
        }
    write_json(record, values)
    return values


def _losses(steps: Sequence[Mapping[str, Any]]) -> list[float]:
    """The training loss in ten parts of the run, each a mean over its steps."""
    losses = [float(step["loss"]) for step in steps]
    bounds = [round(part * len(losses) / _PARTS) for part in range(_PARTS + 1)]
    parts = [losses[low:high] for low, high in pairwise(bounds) if high > low]
    return [round(sum(part) / len(part), 4) for part in parts]


_PARTS = 10


def _write_items(path: Path, settings: Mapping[str, Any], train: Path) -> None:
    """Writes the training items of a run, unless they are there: a resumed run reads the same file."""
    if not path.exists():
        steps, batch, seed = (settings[key] for key in ("steps", "batch", "seed"))
        items = training_items(file_lines(train), steps, batch, seed)
        write_atomically(path, b"".join(items))


def _fingerprint(study: Study, adapter: Path) -> str:
    """The fingerprint of the base's weights that the adapter's file records.

    Raises:
        ConfigError: it is another one than the study's.
    """
    found = str(nemo_config(adapter, "adapter")[0]["base"]["fingerprint"]["value"])
    if study.base.fingerprint not in (None, found):
        raise ConfigError(
            [
                f"base.path={study.base.path}: its weights have fingerprint {found}, not {study.base.fingerprint}, that of "
                f"{study.base.name}; {study.base.remedy}, or set base.name and base.fingerprint"
            ]
        )
    return found


def _checksums(cell: Cell, files: TaskFiles) -> dict[str, str]:
    splits = [cell.settings["split"], *([] if cell.is_base else ["train"])]
    return {split: files.checksums[split] for split in splits}


def _versions() -> dict[str, str | None]:
    return {name: installed_version(name) for name in _PACKAGES}


def _clean(place: Path, keep_adapter: bool) -> None:
    """Removes what a finished run needs no more. Logs stay."""
    shutil.rmtree(place / "training", ignore_errors=True)
    shutil.rmtree(place / "evaluation", ignore_errors=True)
    if not keep_adapter:
        (place / "adapter.nemo").unlink(missing_ok=True)
