# SPDX-License-Identifier: Apache-2.0
"""Compares the length of a run with the checkpoint from which it would resume, before the base is loaded.

Lightning takes no step if the checkpoint is further: the run would silently write the checkpoint's adapter again.
Reads only `checkpoint.json`, or the step in the name of NeMo's own checkpoint. Needs no torch.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from nemo_tied_lora.planning.settings.run_length import as_whole_number
from nemo_tied_lora.planning.settings.run_settings import checkpoint_folder

__all__ = ["resumed_checkpoints", "resumed_step", "resumed_step_problems"]

_STEP = re.compile(r"step=(\d+)")
_DESCRIPTION, _OF_NEMO = "checkpoint.json", ("metadata.json", ".metadata", "common.pt")


def resumed_step_problems(cfg: Mapping[str, Any]) -> Iterator[str]:
    """Refuses a run that ends before the step of the checkpoint from which it would resume, or that has no such file."""
    manager = cfg.get("exp_manager") or {}
    for section in ("model", "exp_manager"):
        given = (cfg.get(section) or {}).get("resume_from_checkpoint")
        if given is not None and not Path(str(given)).exists():
            yield f"{section}.resume_from_checkpoint={given}: no such checkpoint"
        elif given is not None and not _is_checkpoint(Path(str(given))):
            yield f"{section}.resume_from_checkpoint={given}: is not a checkpoint: {_DESCRIPTION} is missing"
    if manager.get("resume_if_exists") and manager.get("resume_ignore_no_checkpoint") is False and not _own(cfg):
        fix = "set it to true, which starts from the beginning"
        yield f"exp_manager.resume_ignore_no_checkpoint=false: the run has no checkpoint yet; {fix}"
    steps, found = as_whole_number((cfg.get("trainer") or {}).get("max_steps")), resumed_step(cfg)
    if steps is None or steps < 1 or found is None:
        return
    step, path = found
    if step > steps:
        yield (
            f"trainer.max_steps={steps}: {path} has trained {step} steps already; set more steps, or set name= or "
            "exp_manager.explicit_log_dir= to another folder to start again"
        )


def resumed_step(cfg: Mapping[str, Any]) -> tuple[int, Path] | None:
    """The step and the path of the checkpoint from which the run would resume. None: there is none, or no step is known."""
    steps = [(step, path) for path in resumed_checkpoints(cfg) if (step := _step_of(path)) is not None]
    return max(steps, default=None, key=lambda found: found[0])


def resumed_checkpoints(cfg: Mapping[str, Any]) -> list[Path]:
    """The checkpoints of which the run would resume from the newest: its own, else the one that the settings name."""
    named = [(cfg.get(section) or {}).get("resume_from_checkpoint") for section in ("exp_manager", "model")]
    return _own(cfg) or [Path(str(path)) for path in named if path is not None][:1]


def _is_checkpoint(path: Path) -> bool:
    return path.is_file() or any((path / name).is_file() for name in (_DESCRIPTION, *_OF_NEMO))


def _own(cfg: Mapping[str, Any]) -> list[Path]:
    """The run's own "-last" checkpoints, which come before a named one."""
    checkpoints = checkpoint_folder(cfg)
    if checkpoints is None or not (cfg.get("exp_manager") or {}).get("resume_if_exists"):
        return []
    return [path for path in _entries(checkpoints) if re.search(r"-last(\.ckpt)?$", path.name)]


def _entries(folder: Path) -> list[Path]:
    try:
        return [path for path in folder.iterdir() if not path.name.startswith(".")]
    except OSError:
        return []


def _step_of(path: Path) -> int | None:
    try:
        return int(json.loads((path / _DESCRIPTION).read_text())["step"])
    except (OSError, ValueError, KeyError, TypeError):
        found = _STEP.search(path.name)
        return int(found[1]) if found else None
