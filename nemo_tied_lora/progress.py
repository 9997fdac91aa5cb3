# SPDX-License-Identifier: Apache-2.0
"""Progress of long work: tqdm's bar on a terminal; in a file or a pipe, a line every 30 s and one at the end."""

from __future__ import annotations

import os
import sys
import time
from typing import Any

from tqdm.std import tqdm

from nemo_tied_lora.tables import duration

__all__ = ["EVERY_S", "Progress", "SoOften", "shows_bars"]

EVERY_S = 30.0
"""Seconds between two lines."""


def shows_bars(file: Any) -> bool:
    """Whether the stream is a terminal with a width. A terminal of a container may have none, and a bar there is empty."""
    if not file.isatty():
        return False
    try:
        return os.get_terminal_size(file.fileno()).columns > 0
    except (OSError, ValueError):
        return True


class SoOften:
    """Says when the next line is due: the first at once, then one every 30 s."""

    def __init__(self) -> None:
        self._last = -EVERY_S

    def __call__(self) -> bool:
        now = time.monotonic()
        if now - self._last < EVERY_S:
            return False
        self._last = now
        return True


class Progress(tqdm):
    """A drop-in for `tqdm` that writes lines where a bar would write thousands of copies of itself."""

    def __init__(self, *args: Any, file: Any = None, **kwargs: Any) -> None:
        file = file or sys.stderr
        self._lines = not shows_bars(file)
        self._shown = 0.0
        if self._lines:
            kwargs |= {"mininterval": EVERY_S, "maxinterval": 2 * EVERY_S}
        super().__init__(*args, file=file, **kwargs)

    def display(self, msg: str | None = None, pos: int | None = None) -> bool:
        """Writes the bar, or a line that says how much is done."""
        if not self._lines:
            return bool(super().display(msg, pos))
        if self.n and self.n != self._shown:
            self._shown = self.n
            self.fp.write(f"{self._line()}\n")
            self.fp.flush()
        return True

    def close(self) -> None:
        """Writes the last state."""
        if self._lines and not self.disable:
            self.display()
            self.__dict__["disable"] = True  # or tqdm would add an empty line
        super().close()

    def _line(self) -> str:
        size = tqdm.format_sizeof if self.unit_scale else str
        done = f"{size(self.n)} of {size(self.total)}" if self.total else size(self.n)
        elapsed = self.format_dict["elapsed"]
        left = (self.total - self.n) / self.n * elapsed if self.total else 0
        rest = f", {duration(left)} left" if left >= 1 else f", {duration(elapsed)}"
        return f"{self.desc.removesuffix(': ')}: {done} {self.unit}{rest}"
