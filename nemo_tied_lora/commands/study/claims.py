# SPDX-License-Identifier: Apache-2.0
"""Claims of runs, so that two `tied-lora compare` do not do the same one. A claim ends with the processes that hold it."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

__all__ = ["claim", "is_claimed"]

_LOCK = "claim"


@contextmanager
def claim(folder: Path) -> Iterator[int | None]:
    """Claims a run's folder. Yields a file descriptor, or None if another process has claimed it.

    The claim is a lock on an open file. Commands that inherit the descriptor (`pass_fds`) hold it too: if only this
    process is killed, the run stays claimed until its command ends.
    """
    folder.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(folder / _LOCK, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield None
            return
        yield descriptor
    finally:
        os.close(descriptor)


def is_claimed(folder: Path) -> bool:
    """Whether a process works on the run now."""
    if not (folder / _LOCK).exists():
        return False
    with claim(folder) as descriptor:
        return descriptor is None
