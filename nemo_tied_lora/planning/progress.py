# SPDX-License-Identifier: Apache-2.0
"""Progress of long work on standard error: a bar in a terminal, a line every so often in a file or pipe."""

from __future__ import annotations

import sys
import time
from types import TracebackType
from typing import Any

__all__ = ["progress"]

_EVERY_S = 30.0


def progress(what: str, total: int, *, unit: str, show: bool = True) -> Any:
    """Returns a context manager whose `update(n)` counts. It shows nothing if `show` is False.

    Args:
        unit: what is counted; "B" is shown as kB, MB and so on.
    """
    if show and sys.stderr.isatty():
        try:
            from tqdm import tqdm
        except ModuleNotFoundError:  # without NeMo it need not be installed
            return _Lines(what, total)
        return tqdm(desc=what, total=total, unit=unit, unit_scale=unit == "B")
    return _Lines(what, total if show else 0)


class _Lines:
    """Prints one line every `_EVERY_S` seconds, and none for shorter work."""

    def __init__(self, what: str, total: int) -> None:
        self._what, self._total, self._done, self._printed = what, total, 0, time.monotonic()

    def __enter__(self) -> _Lines:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        pass

    def update(self, count: int) -> None:
        self._done += count
        if self._total and time.monotonic() - self._printed >= _EVERY_S:
            self._printed = time.monotonic()
            print(f"{self._what}: {min(1.0, self._done / self._total):.0%}", file=sys.stderr, flush=True)
