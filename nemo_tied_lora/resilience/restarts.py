# SPDX-License-Identifier: Apache-2.0
"""Decides from the status file whether a run has finished before, and whether it may start again."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from nemo_tied_lora.errors import ConfigError
from nemo_tied_lora.planning.settings.run_settings import run_folder
from nemo_tied_lora.resilience.status_file import STATUS_FILE, read_status

__all__ = ["Preempted", "fingerprint", "finished_already", "finished_before", "own_folder", "restarted"]


# Settings that change neither the training nor the place of the result.
_IRRELEVANT = ("verbose", "preflight", "watchdog", "preemption")
_IRRELEVANT_TRAINER = ("devices", "num_nodes", "enable_progress_bar", "log_every_n_steps")


class Preempted(Exception):
    """The run was asked to stop and has saved a checkpoint. The same command resumes it."""


def fingerprint(values: Mapping[str, Any]) -> str:
    """Hashes the settings and input files that decide the result of a run. The number of ranks is not one of them."""
    settings = {key: value for key, value in values.items() if key not in _IRRELEVANT}
    settings["trainer"] = {k: v for k, v in values["trainer"].items() if k not in _IRRELEVANT_TRAINER}
    data = (values["model"].get("data") or {}).values()
    files = [file for section in data if isinstance(section, Mapping) for file in section.get("file_names") or []]
    files += [values["model"].get("restore_from_path"), (values["model"].get("peft") or {}).get("restore_from_path")]
    stamps = {str(file): _stamp(str(file)) for file in files if file is not None}
    text = json.dumps([settings, stamps], sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def finished_before(folder: Path | None, settings: str) -> str | None:
    """Returns the file that a run with these settings has written in this folder. None: it has not finished."""
    status = None if folder is None else read_status(folder)
    if status is None or status.get("state") != "finished" or status.get("settings") != settings:
        return None
    output = Path(str(status.get("output")))
    return str(output) if output.exists() and output.with_name("metrics.json").exists() else None


def own_folder(values: Mapping[str, Any]) -> Path | None:
    """The folder of this run. None: it is no run, or its folder is a new one each time."""
    return None if values.get("preflight") == "only" or "preemption" not in values else run_folder(values)


def finished_already(values: Mapping[str, Any]) -> str | None:
    """The message to print if this very run has finished before; a finished run is not repeated. None: it has not."""
    folder = own_folder(values)
    output = None if folder is None else finished_before(folder, fingerprint(values))
    if output is None:
        return None
    return f"finished already: {output}; for another run, change the settings, name=, or remove {folder}"


def restarted(folder: Path | None, settings: str, allowed: int) -> dict[str, int]:
    """Returns the new run's counts of restarts: all, and those in a row without a new checkpoint.

    Raises:
        ConfigError: more than `allowed` restarts in a row without a new checkpoint.
    """
    before = None if folder is None else read_status(folder)
    if before is None or before.get("settings") != settings or before.get("state") == "finished":
        return {"restarts": 0, "fruitless_restarts": 0, "saved_before": 0}
    saved = int(before.get("saved_step") or 0)
    further = saved > int(before.get("saved_before") or 0) or before.get("state") == "preempted"
    fruitless = 0 if further else int(before.get("fruitless_restarts") or 0) + 1
    if fruitless > allowed:
        reason = before.get("reason") or f"its last state was {before.get('state')!r}"
        fix = f"find out why ({reason}), then remove {folder}/{STATUS_FILE} or raise preemption.max_restarts"
        raise ConfigError([f"preemption.max_restarts={allowed}: {fruitless} restarts in a row saved nothing; {fix}"])
    return {"restarts": int(before.get("restarts") or 0) + 1, "fruitless_restarts": fruitless, "saved_before": saved}


def _stamp(path: str) -> list[int] | None:
    """Returns a file's size and time of change. None if there is no file."""
    try:
        found = os.stat(path)
    except OSError:
        return None
    return [found.st_size, found.st_mtime_ns]
