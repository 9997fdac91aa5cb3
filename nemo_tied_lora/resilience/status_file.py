# SPDX-License-Identifier: Apache-2.0
"""Writes and reads `status.json`, which shows what a run is doing. The next run with the same settings reads it too.

One rank writes it atomically. Imports neither torch nor NeMo.
"""

from __future__ import annotations

import json
import threading
import time
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from nemo_tied_lora.files import write_json

__all__ = ["ENDED", "STALE_S", "STATES", "STATUS_FILE", "RunStatus", "read_status"]


STATES = ("starting", "preflight", "training", "saving", "finished", "failed", "preempted")
ENDED = ("finished", "failed", "preempted")
STALE_S = 60
"""Seconds. A running run renews its file at least every ten seconds; an older file shows no sign of life."""


STATUS_FILE = "status.json"
_EVERY_S = 2.0
_RENEW_S = 10.0


class RunStatus:
    """Writes the file on the one rank that is `active`. On other ranks only `fail` has an effect. Thread-safe."""

    def __init__(self, folder: Path | None, *, active: bool, **fields: Any) -> None:
        self._path = None if folder is None else folder / STATUS_FILE
        self._active, self._lock, self._written = active, threading.RLock(), 0.0
        self._fields: dict[str, Any] = {"state": "starting", **fields}

    @property
    def folder(self) -> Path | None:
        """The run's folder. None: nothing is written."""
        return None if self._path is None else self._path.parent

    def update(self, *, now: Any = False, **fields: Any) -> None:
        """Sets fields. Writes at once if the state changes or `now` is true, otherwise at most every two seconds."""
        with self._lock:
            changed = "state" in fields and fields["state"] != self._fields["state"]
            self._fields |= fields
            if now or changed or time.monotonic() - self._written >= _EVERY_S:
                self._write()

    def start(self) -> None:
        """Writes the file, and renews it from a thread as a sign of life."""
        self.update(now=True)
        if self._active and self._path is not None:
            threading.Thread(target=self._renew, daemon=True).start()

    def fail(self, reason: str) -> None:
        """Records why the run ended. A rank that is not active adds the reason to the file's current content."""
        with self._lock:
            if not self._active and self._path is not None:
                self._fields = read_status(self._path.parent) or self._fields
                if self._fields["state"] in ENDED:  # rank 0 has recorded the end, and knew more
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
    """Returns the content of `status.json` in the folder. None if it is missing or unreadable."""
    try:
        values = json.loads((folder / STATUS_FILE).read_text())
    except (OSError, ValueError):
        return None
    return values if isinstance(values, dict) else None
