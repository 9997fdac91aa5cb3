# SPDX-License-Identifier: Apache-2.0
"""Remembers which large data files were found right, by path, size and time of change, so that they are read once.

The files are in `$XDG_CACHE_HOME/tied-lora`, or `~/.cache/tied-lora`. Where nothing can be written, nothing is
remembered. Only files without problems are.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import time
from pathlib import Path

from nemo_tied_lora.files import write_json
from nemo_tied_lora.planning.data.example_forms import Form

__all__ = ["known_notes", "remember"]

_RULES = 1
"""Raise it when the check finds something new, so that files are checked again."""
_LEAST_BYTES = 4 << 20
"""Smaller files are checked in less time than a person notices."""
_YOUNG_S = 2.0
"""A file that changed so recently may change again within the same tick of its clock."""


def known_notes(path: Path, form: Form) -> list[str] | None:
    """Returns the notes on a file that was found right before and has not changed. None: it must be read."""
    with contextlib.suppress(OSError, ValueError, RuntimeError, KeyError, TypeError):
        if path.stat().st_size >= _LEAST_BYTES:
            notes = json.loads(_place(path, form).read_bytes())["notes"]
            return [str(note) for note in notes]
    return None


def remember(path: Path, form: Form, notes: list[str]) -> None:
    """Records that a file was found right."""
    with contextlib.suppress(OSError, RuntimeError):
        found = path.stat()
        if found.st_size >= _LEAST_BYTES and time.time() - found.st_mtime > _YOUNG_S:
            write_json(_place(path, form), {"file": str(path.resolve()), "notes": notes})


def _place(path: Path, form: Form) -> Path:
    """Raises RuntimeError if the user has no home."""
    found = path.stat()
    text = json.dumps([_RULES, str(path.resolve()), found.st_size, found.st_mtime_ns, repr(form)])
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(cache) / "tied-lora" / f"data-{hashlib.sha256(text.encode()).hexdigest()[:32]}.json"
