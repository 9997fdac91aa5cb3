# SPDX-License-Identifier: Apache-2.0
"""With verbose=false, a rank prints this package's lines and the progress bar. What others print goes to a file.

Others are NeMo, Lightning, tokenizers, warnings, and code in C++, Rust or `make`, which writes to the file numbers 1 and 2 and
knows no Python. So those numbers lead to the file, and `sys.stdout` and `sys.stderr` look at who writes: a list of loggers to
silence would be long, and never complete. The file matters if a rank crashes: what C++ says last is in it.
"""

from __future__ import annotations

import io
import os
import sys
import tempfile
from contextlib import suppress
from pathlib import Path
from types import FrameType
from typing import Any, TextIO

__all__ = ["OtherOutput"]

_OURS = ("nemo_tied_lora",)
# Lightning's bar, and NeMo's, which is derived from it.
_BARS = ("lightning.pytorch.callbacks.progress", "nemo.collections.nlp.parts.nlp_overrides")
# Who sets one of these wants to see what C++ prints.
_ASKED_FOR = ("NCCL_DEBUG", "TORCH_CPP_LOG_LEVEL", "TORCH_DISTRIBUTED_DEBUG", "TORCH_LOGS")


class OtherOutput:
    """The file that gets other packages' output, until `end`: a temporary one, until `keep_in` names a folder.

    Args:
        name: the file's name without its ending, such as "finetune-rank-3".
        wanted: False shows everything, and makes no file.
    """

    def __init__(self, name: str, *, wanted: bool = True) -> None:
        self._name, self._wanted, self.path = name, wanted, Path(os.devnull)
        if not wanted:
            return
        number, place = tempfile.mkstemp(prefix=f"tied-lora-{name}-", suffix=".log")
        self.path, self._temporary = Path(place), True
        self._before = sys.stdout, sys.stderr
        self._numbers = os.dup(1), os.dup(2)
        self._file = os.fdopen(number, "w", encoding="utf-8", errors="replace", buffering=1)
        self._redirect()
        shown = [_reopened(n, stream) for n, stream in zip(self._numbers, self._before, strict=True)]
        sys.stdout, sys.stderr = (_Shown(stream, self._file) for stream in shown)

    def keep_in(self, folder: Path | None) -> None:
        """Moves the file into the folder, where it stays. If that is not possible, it stays where it is."""
        if not self._wanted or folder is None:
            return
        path = folder / f"{self._name}.log"
        with suppress(OSError):
            self._file.flush()
            with path.open("ab") as kept:
                kept.write(self.path.read_bytes())
                os.dup2(kept.fileno(), self._file.fileno())
            self._redirect()
            self.path.unlink()
            self.path, self._temporary = path, False

    def end(self, *, keep: bool) -> None:
        """Shows everything again. Deletes a temporary file if `keep` is False."""
        if not self._wanted:
            return
        self._wanted = False
        for stream in (sys.stdout, sys.stderr, self._file):
            with suppress(OSError, ValueError):
                stream.flush()
        sys.stdout, sys.stderr = self._before
        for number, saved in zip((1, 2), self._numbers, strict=True):
            os.dup2(saved, number)
            os.close(saved)
        if self._temporary and not keep:
            with suppress(OSError):
                self.path.unlink()

    def _redirect(self) -> None:
        if not any(os.environ.get(name) for name in _ASKED_FOR):
            for number in (1, 2):
                os.dup2(self._file.fileno(), number)


class _Shown(io.TextIOBase):
    """A stream that passes on what this package and the progress bar write. The rest goes to the other stream."""

    def __init__(self, shown: TextIO, other: TextIO) -> None:
        self._shown, self._other = shown, other

    @property
    def encoding(self) -> str:  # type: ignore[override]
        """tqdm asks whether it can draw."""
        return self._shown.encoding

    def writable(self) -> bool:
        """Always."""
        return True

    def isatty(self) -> bool:
        """Whether a terminal shows it."""
        return self._shown.isatty()

    @property
    def buffer(self) -> Any:
        """Takes bytes. This package writes none."""
        return self._other.buffer

    def fileno(self) -> int:
        """The number of the stream that the caller would write to: tqdm asks for the terminal's width with it."""
        return (self._shown if _is_ours(sys._getframe(1)) else self._other).fileno()

    def write(self, text: str) -> int:
        """Writes to one of the two streams."""
        stream = self._shown if _is_ours(sys._getframe(1)) else self._other
        return stream.write(text)

    def flush(self) -> None:
        """Flushes both."""
        self._shown.flush()
        with suppress(ValueError):
            self._other.flush()


def _is_ours(frame: FrameType | None) -> bool:
    """Whether this package writes, directly or through tqdm, or Lightning draws its bar."""
    drawn = False
    while frame is not None:
        module = str(frame.f_globals.get("__name__", ""))
        if not module.startswith(("tqdm", "contextlib")):
            return module.startswith(_OURS) or (drawn and module.startswith(_BARS))
        drawn, frame = True, frame.f_back
    return False


def _reopened(number: int, stream: Any) -> TextIO:
    """The same stream under another file number. It writes each line at once, because a rank may end without a last flush."""
    encoding = getattr(stream, "encoding", None) or "utf-8"
    raw = os.fdopen(number, "wb", closefd=False)
    return io.TextIOWrapper(raw, encoding=encoding, errors="replace", line_buffering=True)
