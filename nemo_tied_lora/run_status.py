# SPDX-License-Identifier: Apache-2.0
"""`status.json`: what a run is doing, seen from outside, and by the run that comes after it.

One rank writes it, atomically, so that a reader meets a whole file. Neither torch nor NeMo is imported.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import threading
import time
from collections.abc import Mapping
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from nemo_tied_lora.config import ConfigError
from nemo_tied_lora.files import write_json

__all__ = [
    "ENDED",
    "STALE_S",
    "STATES",
    "Preempted",
    "RunStatus",
    "fingerprint",
    "finished_before",
    "read_status",
    "restarted",
    "survival_problems",
]

STATES = ("starting", "preflight", "training", "saving", "finished", "failed", "preempted")
ENDED = ("finished", "failed", "preempted")
STALE_S = 60
"""A run that has not ended renews its file at least every ten seconds; one that is older shows no sign of life."""

_NAME = "status.json"
_EVERY_S = 2.0
_RENEW_S = 10.0
# What does not change what is trained, or where the result lies.
_IRRELEVANT = ("verbose", "preflight", "watchdog", "preemption")
_IRRELEVANT_TRAINER = ("devices", "num_nodes", "enable_progress_bar", "log_every_n_steps")


class Preempted(Exception):
    """The run has been asked to stop, has saved what it had, and can be continued."""


class RunStatus:
    """The writer. `active` on one rank; elsewhere everything but `fail` does nothing. Threads may share it."""

    def __init__(self, folder: Path | None, *, active: bool, **fields: Any) -> None:
        self._path = None if folder is None else folder / _NAME
        self._active, self._lock, self._written = active, threading.RLock(), 0.0
        self._fields: dict[str, Any] = {"state": "starting", **fields}

    def update(self, *, now: Any = False, **fields: Any) -> None:
        """Sets fields; writes at once where the state changes or `now` says so, else every two seconds at most."""
        with self._lock:
            changed = "state" in fields and fields["state"] != self._fields["state"]
            self._fields |= fields
            if now or changed or time.monotonic() - self._written >= _EVERY_S:
                self._write()

    def start(self) -> None:
        """Writes, and from now on renews the file from a thread, as a sign of life."""
        self.update(now=True)
        if self._active and self._path is not None:
            threading.Thread(target=self._renew, daemon=True).start()

    def fail(self, reason: str) -> None:
        """Records why the run ended, from any rank: on one that is not active, in what the file says by now."""
        with self._lock:
            if not self._active and self._path is not None:
                self._fields = read_status(self._path.parent) or self._fields
                if self._fields["state"] in ENDED:  # by rank 0, which knew more
                    return
            self._active = True
            self.update(now=True, state="failed", reason=reason)

    def __getitem__(self, name: str) -> Any:
        return self._fields.get(name)

    def _renew(self) -> None:
        while self._fields["state"] not in ENDED:
            time.sleep(_RENEW_S)
            with self._lock:
                if self._fields["state"] not in ENDED:
                    self._write()

    def _write(self) -> None:
        if not self._active or self._path is None:
            return
        self._written = time.monotonic()
        updated = datetime.now(timezone.utc).isoformat(timespec="seconds")
        write_json(self._path, {**self._fields, "updated": updated})


def read_status(folder: Path) -> dict[str, Any] | None:
    """What `status.json` in the folder says; None where there is none, or none that can be read."""
    try:
        values = json.loads((folder / _NAME).read_text())
    except (OSError, ValueError):
        return None
    return values if isinstance(values, dict) else None


def fingerprint(values: Mapping[str, Any]) -> str:
    """Of the settings and input files that decide what comes out of a run; not of how many ranks it runs on."""
    settings = {key: value for key, value in values.items() if key not in _IRRELEVANT}
    settings["trainer"] = {k: v for k, v in values["trainer"].items() if k not in _IRRELEVANT_TRAINER}
    data = (values["model"].get("data") or {}).values()
    files = [file for section in data if isinstance(section, Mapping) for file in section.get("file_names") or []]
    files += [values["model"].get("restore_from_path"), (values["model"].get("peft") or {}).get("restore_from_path")]
    stamps = {str(file): _stamp(str(file)) for file in files if file is not None}
    text = json.dumps([settings, stamps], sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def finished_before(folder: Path | None, settings: str) -> str | None:
    """The file that a run with these settings has already written in this folder; None: it has yet to finish."""
    status = None if folder is None else read_status(folder)
    if status is None or status.get("state") != "finished" or status.get("settings") != settings:
        return None
    output = Path(str(status.get("output")))
    return str(output) if output.exists() and output.with_name("metrics.json").exists() else None


def restarted(folder: Path | None, settings: str, allowed: int) -> dict[str, int]:
    """The new run's counts of restarts: all, and those in a row after which no further checkpoint was there.

    Raises:
        ConfigError: more than `allowed` in a row: something ends every run before it can save.
    """
    before = None if folder is None else read_status(folder)
    if before is None or before.get("settings") != settings or before.get("state") == "finished":
        return {"restarts": 0, "fruitless_restarts": 0, "saved_before": 0}
    saved = int(before.get("saved_step") or 0)
    further = saved > int(before.get("saved_before") or 0) or before.get("state") == "preempted"
    fruitless = 0 if further else int(before.get("fruitless_restarts") or 0) + 1
    if fruitless > allowed:
        reason = before.get("reason") or f"its last state was {before.get('state')!r}"
        fix = f"find out why ({reason}), then remove {folder}/{_NAME} or raise preemption.max_restarts"
        raise ConfigError([f"preemption.max_restarts={allowed}: {fruitless} restarts in a row saved nothing; {fix}"])
    return {"restarts": int(before.get("restarts") or 0) + 1, "fruitless_restarts": fruitless, "saved_before": saved}


def survival_problems(cfg: Mapping[str, Any]) -> list[str]:
    """What is wrong with `preflight`, `watchdog` and `preemption`, a line each."""
    problems = []
    if cfg.get("preflight") not in (True, False, "only"):
        problems.append(f"preflight={cfg.get('preflight')!r}: must be true, false or only")
    for key, (low, high) in _BOUNDS.items():
        section, _, name = key.partition(".")
        value = (cfg.get(section) or {}).get(name)
        kinds = int if section == "preemption" else (int, float)
        if isinstance(value, bool) or not isinstance(value, kinds) or not low <= value <= high:
            bound = f"of at least {low}" if high == math.inf else f"from {low} to {high}"
            problems.append(f"{key}={value!r}: must be a number {bound}")
    return problems


_BOUNDS = {
    "watchdog.start_s": (1, math.inf),
    "watchdog.timeout_s": (0, math.inf),
    "watchdog.stuck_s": (0, math.inf),
    "preemption.exit_code": (0, 255),
    "preemption.max_restarts": (0, math.inf),
}


def _stamp(path: str) -> list[int] | None:
    try:
        found = os.stat(path)
    except OSError:
        return None
    return [found.st_size, found.st_mtime_ns]
