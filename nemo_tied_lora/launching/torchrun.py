# SPDX-License-Identifier: Apache-2.0
"""Starts a command's ranks on this machine with torchrun."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

__all__ = ["is_rank", "start_ranks"]


def is_rank() -> bool:
    """Whether a launcher started this process as a rank."""
    return "RANK" in os.environ and "WORLD_SIZE" in os.environ


def start_ranks(module: str, arguments: Sequence[str], num_ranks: int) -> int:
    """Runs `python -m module arguments` on `num_ranks` ranks with torchrun. Returns the exit code.

    torchrun picks a free port, and ends all ranks when one dies.
    """
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // num_ranks)))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--local-addr", "127.0.0.1"]
    command += ["--nproc-per-node", str(num_ranks), "-m", module, *arguments]
    process = subprocess.Popen(command)
    handlers = {number: signal.signal(number, lambda n, _: _pass_on(process, n)) for number in _PASSED_ON}
    try:
        return process.wait()
    except KeyboardInterrupt:
        process.wait()
        return 130
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


_PASSED_ON = (signal.SIGTERM, signal.SIGUSR1)


def _pass_on(process: subprocess.Popen[bytes], number: int) -> None:
    """Sends a signal to the ranks, not to torchrun, which would kill them 30 s later. Without ranks, ends torchrun."""
    lists = Path(f"/proc/{process.pid}/task").glob("*/children")
    ranks = [int(pid) for children in lists for pid in children.read_text().split()]
    for pid in ranks or [process.pid]:
        os.kill(pid, number if ranks else signal.SIGTERM)
