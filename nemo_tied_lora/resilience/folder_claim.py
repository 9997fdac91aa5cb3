# SPDX-License-Identifier: Apache-2.0
"""Claims a run's folder, so that two runs never write into one. A claim ends with the process that holds it.

The claim is a lock on the folder itself: NeMo moves a resumed run's files into another folder, but not the folder. Imports
neither torch nor NeMo.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
from pathlib import Path

from nemo_tied_lora.errors import ConfigError
from nemo_tied_lora.resilience.status_file import read_status

__all__ = ["check_unclaimed", "claim_folder"]

_HELD: dict[Path, int] = {}
"""The folders that this process has claimed, open."""


def claim_folder(folder: Path) -> None:
    """Makes the folder if needed, and claims it until this process ends.

    A file system that does not lock folders, such as NFS, lets every process pass; so the lock of a dead node cannot keep a
    run from its restart.

    Raises:
        ConfigError: another process has claimed it.
    """
    if folder.resolve() in _HELD:
        return
    with contextlib.suppress(OSError):  # a folder that cannot be made is refused elsewhere
        folder.mkdir(parents=True, exist_ok=True)
    opened = _locked(folder)
    if opened is not None:
        _HELD[folder.resolve()] = opened


def check_unclaimed(folder: Path) -> None:
    """Raises ConfigError if another process has claimed the folder. Claims nothing."""
    opened = None if folder.resolve() in _HELD else _locked(folder)
    if opened is not None:
        os.close(opened)


def _locked(folder: Path) -> int | None:
    """The open folder with a lock. None: there is no folder, or it cannot be locked.

    Raises:
        ConfigError: another process has the lock.
    """
    try:
        opened = os.open(folder, os.O_RDONLY)
    except OSError:
        return None
    try:
        fcntl.flock(opened, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        os.close(opened)
        if isinstance(error, BlockingIOError):
            raise ConfigError([_taken(folder)]) from None
        return None
    return opened


def _taken(folder: Path) -> str:
    status = read_status(folder) or {}
    facts = [f"process {status['pid']} on node {status['node']}"] if {"pid", "node"} <= status.keys() else []
    facts += [f"{status['state']}, step {status['step']}"] if {"state", "step"} <= status.keys() else []
    who = f" ({', '.join(facts)})" if facts else ""
    return (
        f"exp_manager: another run works in {folder}{who}; wait for it, stop it, or give this run a folder of its own with name= "
        "or exp_manager.explicit_log_dir="
    )
