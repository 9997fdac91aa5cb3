# SPDX-License-Identifier: Apache-2.0
"""An error that no check has foreseen ends in one line. Its traceback goes to a file, or to stderr with TIED_LORA_TRACEBACK=1.

Imports no torch.
"""

from __future__ import annotations

import os
import re
import sys
import tempfile
import traceback
from contextlib import suppress
from pathlib import Path

__all__ = ["TRACEBACK", "describe", "keep_traceback", "say"]

TRACEBACK = "TIED_LORA_TRACEBACK"
"""The environment variable that sends tracebacks to stderr."""

_LONGEST = 600
_OUT_OF_MEMORY = ("out of memory", "can't allocate memory", "cannot allocate memory", "not enough memory")
_SPLIT = "or split the model over more ranks (layout=)"
_LESS_MEMORY = {
    "generate": f"lower batch_size or tokens_to_generate, {_SPLIT}",
    "merge": "use a machine with more memory; verify=false needs less",
    "import": "use a machine with more memory; verify=false needs less",
}
_TRAIN_WITH_LESS = (
    "lower model.micro_batch_size or the sequence length, recompute (model.activations_checkpoint_granularity=full), "
    f"{_SPLIT}"
)


def describe(error: BaseException, command: str) -> str:
    """Returns the error as one line: its type and the first line of its message; the second too if the first ends with ":".

    If the memory was too small, the line says what to change for this command. torch's CheckpointException is described by the
    first error that it holds: its own message is a dictionary of ranks.
    """
    failures = getattr(error, "failures", None)  # {rank: (exception, stack)}
    if isinstance(failures, dict) and failures:
        error = next((pair[0] for pair in failures.values() if isinstance(pair, tuple)), error)
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    text = ""
    for line in lines:
        text = f"{text} {line}".strip()
        if not line.endswith(":"):
            break
    text = text if len(text) <= _LONGEST else f"{text[:_LONGEST]} ..."
    named = f"{type(error).__name__}: {text}" if text else type(error).__name__
    short_of_memory = isinstance(error, MemoryError) or any(mark in str(error).lower() for mark in _OUT_OF_MEMORY)
    return f"{named}; out of memory: {_LESS_MEMORY.get(command, _TRAIN_WITH_LESS)}" if short_of_memory else named


def keep_traceback(error: BaseException, name: str, folder: Path | None = None) -> str:
    """Writes the traceback, and returns a text that says where it is.

    Args:
        name: the file's name without its ending, such as "finetune-rank-3".
        folder: the run's folder. If it is None or cannot be written, a temporary file gets the traceback.
    """
    text = "".join(traceback.format_exception(error))
    if os.environ.get(TRACEBACK, "0") not in ("", "0"):
        say(text.rstrip())
        return "its traceback is on stderr"
    with suppress(OSError):
        return f"the traceback is in {_written(text, name, folder)}"
    say(text.rstrip())
    return "its traceback is on stderr, because no file can be written"


def say(line: str) -> None:
    """Prints on stderr. Does nothing if nobody can read it: an error on the way out must not hide the first one."""
    with suppress(OSError, ValueError, AttributeError):
        print(line, file=sys.stderr, flush=True)


def _written(text: str, name: str, folder: Path | None) -> Path:
    name = re.sub(r"[^\w.-]", "-", name)
    if folder is not None and folder.is_dir():
        with suppress(OSError):
            path = folder / f"{name}.traceback"
            path.write_text(text, encoding="utf-8")
            return path
    number, place = tempfile.mkstemp(prefix=f"tied-lora-{name}-", suffix=".traceback")
    with os.fdopen(number, "w", encoding="utf-8") as file:
        file.write(text)
    return Path(place)
