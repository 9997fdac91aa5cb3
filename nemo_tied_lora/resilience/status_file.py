# SPDX-License-Identifier: Apache-2.0
"""`status.json`: what a run is doing, seen from outside, and by the run that comes after it.

One rank writes it, atomically, so that a reader meets a whole file. Neither torch nor NeMo is imported.
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
"""A run that has not ended renews its file at least every ten seconds; one that is older shows no sign of life."""


STATUS_FILE = "status.json"
_EVERY_S = 2.0
_RENEW_S = 10.0


class RunStatus:
    """The writer. `active` on one rank; elsewhere everything but `fail` does nothing. Threads may share it."""

    def __init__(self, folder: Path | None, *, active: bool, **fields: Any) -> None:
        self._path = None if folder is None else folder / STATUS_FILE
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
        values = json.loads((folder / STATUS_FILE).read_text())
    except (OSError, ValueError):
        return None
    return values if isinstance(values, dict) else None
