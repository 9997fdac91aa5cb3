# SPDX-License-Identifier: Apache-2.0
"""`python -m tests.slurm.remains FOLDER` cleans up a private SLURM after the process that started it has ended, or was killed.

Its standard input is a pipe that only that process holds open. When the pipe closes, it kills every process of the
SLURM and removes the folder. After an orderly end only the folder is left to remove.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path

__all__ = ["clear", "processes"]

_SECONDS = 20


def processes(folder: Path, node: str | None = None) -> list[int]:
    """Returns the process ids of the SLURM in the folder: its daemons, its jobs, and the slurmstepd above them.

    Args:
        node: only processes of jobs on this node, and their slurmstepd.
    """
    wanted = {f"SLURM_CONF={folder / 'slurm.conf'}", *([] if node is None else [f"SLURMD_NODENAME={node}"])}
    found: set[int] = set()
    for path in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if wanted <= set((path / "environ").read_bytes().decode(errors="replace").split("\0")):
                found |= {int(path.name), *_stepd_over(path)}
    return sorted(found)


def clear(folder: Path) -> None:
    """Kills all processes of the SLURM, and removes the folder."""
    end = time.monotonic() + _SECONDS
    while time.monotonic() < end:
        left = [process for process in processes(folder) if process != os.getpid()]
        if not left:
            break
        for process in left:
            with contextlib.suppress(ProcessLookupError):
                os.kill(process, signal.SIGKILL)
        time.sleep(0.2)
    shutil.rmtree(folder, ignore_errors=True)


def _stepd_over(path: Path) -> Iterator[int]:
    """Yields the parent of a process if it is a slurmstepd, whose own environment is overwritten by its title."""
    parent = int((path / "stat").read_text().rpartition(")")[2].split()[1])
    if (Path("/proc") / str(parent) / "comm").read_text().startswith("slurmstepd"):
        yield parent


if __name__ == "__main__":
    sys.stdin.buffer.read()
    clear(Path(sys.argv[1]))
