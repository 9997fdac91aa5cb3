# SPDX-License-Identifier: Apache-2.0
"""Keeps other processes away while one makes files, or uses them."""

from __future__ import annotations

import contextlib
import fcntl
from collections.abc import Iterator
from pathlib import Path
from typing import IO

__all__ = ["alone", "in_use", "use"]

_USED: dict[Path, IO[str]] = {}


@contextlib.contextmanager
def alone(lock: Path) -> Iterator[None]:
    """Waits until no other process holds the lock file, and holds it. On a file system without locks it does not wait.

    Raises:
        OSError: the lock file or its folder cannot be made.
    """
    lock.parent.mkdir(parents=True, exist_ok=True)
    with lock.open("a") as file:
        with contextlib.suppress(OSError):
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def use(folder: Path) -> None:
    """Marks a folder's files as used by this process until it ends. Without locks, or without the right to write, does nothing."""
    with contextlib.suppress(OSError):
        mark = (folder / ".in_use").open("a")
        _USED[folder.resolve()] = mark  # an older one is closed
        fcntl.flock(mark, fcntl.LOCK_SH | fcntl.LOCK_NB)


def in_use(folder: Path) -> bool:
    """Whether another process uses the folder's files. This process uses them no more."""
    own = _USED.pop(folder.resolve(), None)
    if own is not None:
        own.close()
    try:
        with (folder / ".in_use").open("a") as mark:
            fcntl.flock(mark, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        pass
    return False
