# SPDX-License-Identifier: Apache-2.0
"""`python -m tests.slurm.remains FOLDER`: outlives whoever started a private SLURM, however that ends, and clears up.

Its standard input is a pipe that only the starter holds open. At its end every process of that SLURM is killed and its
folder is removed; after an orderly end nothing but the folder is left to do.
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
    """Of the SLURM whose configuration lies in the folder: daemons, jobs and the slurmstepd over them.

    Args:
        node: only what its jobs run there, with their slurmstepd.
    """
    wanted = {f"SLURM_CONF={folder / 'slurm.conf'}", *([] if node is None else [f"SLURMD_NODENAME={node}"])}
    found: set[int] = set()
    for path in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if wanted <= set((path / "environ").read_bytes().decode(errors="replace").split("\0")):
                found |= {int(path.name), *_stepd_over(path)}
    return sorted(found)


def clear(folder: Path) -> None:
    """Kills all of them, and removes the folder."""
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
    """A slurmstepd writes its title over its environment; it is known by its children."""
    parent = int((path / "stat").read_text().rpartition(")")[2].split()[1])
    if (Path("/proc") / str(parent) / "comm").read_text().startswith("slurmstepd"):
        yield parent


if __name__ == "__main__":
    sys.stdin.buffer.read()
    clear(Path(sys.argv[1]))
