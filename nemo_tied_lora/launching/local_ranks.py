# SPDX-License-Identifier: Apache-2.0
"""Starts a command's ranks on this machine and ends them together. Imports no torch.

Instead of torchrun, which returns 1 whatever a rank returned, and prints a traceback and a table of its own after the message:
an exit code says whether to start a run again (docs/operations.md).
"""

from __future__ import annotations

import ctypes
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from types import FrameType

from nemo_tied_lora.planning.rank_variables import FAILURE_PIPE, INTERRUPTED, LAUNCHER, STARTED_BY, STORE_SOCKET

__all__ = ["exit_code", "follow_launcher", "rank_variables", "start_ranks"]

_PASSED_ON = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
_POLL_S = 0.05
_GRACE_S = 30.0
_PR_SET_PDEATHSIG = 1


def start_ranks(module: str, arguments: Sequence[str], num_ranks: int) -> int:
    """Runs `python -m module arguments` on `num_ranks` ranks. Returns 0, or the code of the first rank that failed.

    When a rank fails, the others get SIGTERM, and 30 s later SIGKILL. SIGTERM, SIGUSR1 and SIGINT are passed on to all ranks.
    If this process is killed, the ranks get SIGTERM.

    Returns:
        128 + N if signal N ended the rank.
    """
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // num_ranks)))
    sys.stdout.flush()
    sys.stderr.flush()
    ranks: list[subprocess.Popen[bytes]] = []
    told, tell = os.pipe()
    with _passed_on(ranks) as got, socket.create_server(("127.0.0.1", 0), backlog=4 * num_ranks) as listening:
        for rank in range(num_ranks):
            environment = {**os.environ, **rank_variables(rank, num_ranks, listening.getsockname()[1])}
            environment[FAILURE_PIPE] = str(told)
            shared: tuple[int, ...] = (told,)
            if rank == 0 and num_ranks > 1:
                shared = (told, listening.fileno())
                environment[STORE_SOCKET] = str(listening.fileno())
            command = [sys.executable, "-m", module, *arguments]
            ranks.append(subprocess.Popen(command, env=environment, pass_fds=shared, stdin=subprocess.DEVNULL))
        os.close(told)
        listening.close()  # otherwise the ranks could still connect after the death of rank 0
        if got:  # a signal that arrived between two starts
            _send(got[0], ranks)
        try:
            return _wait(ranks, got, tell)
        finally:
            os.close(tell)


def rank_variables(rank: int, num_ranks: int, port: int) -> dict[str, str]:
    """Returns the environment variables that tell a process which rank it is."""
    numbers = {"RANK": rank, "LOCAL_RANK": rank, "NODE_RANK": 0, "GROUP_RANK": 0}
    sizes = {"WORLD_SIZE": num_ranks, "LOCAL_WORLD_SIZE": num_ranks}
    place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, LAUNCHER: os.getpid()}
    return {name: str(value) for name, value in {**numbers, **sizes, **place}.items()}


def follow_launcher(environment: Mapping[str, str] = os.environ) -> None:
    """Asks Linux to send SIGTERM to this rank or stage when the process of ours dies that has started it.

    Without such a process, does nothing.
    """
    launcher = environment.get(LAUNCHER) or environment.get(STARTED_BY)
    if launcher is None or not sys.platform.startswith("linux"):
        return
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
    if os.getppid() != int(launcher):  # it died before the request
        os.kill(os.getpid(), signal.SIGTERM)


def exit_code(returncode: int) -> int:
    """Returns the exit code as a shell reports it: 128 + N for a process that signal N has ended (-N)."""
    return returncode if returncode >= 0 else 128 - returncode


def _wait(ranks: Sequence[subprocess.Popen[bytes]], got: Sequence[int], tell: int) -> int:
    """Waits for all ranks, and ends the others when one fails. Returns the exit code of the first that failed."""
    failed: int | None = None
    deadline = float("inf")
    running = dict(enumerate(ranks))
    while running:
        for number, rank in list(running.items()):
            if rank.poll() is None:
                continue
            del running[number]
            if rank.returncode != 0 and failed is None:
                failed = exit_code(rank.returncode)
                _name_killed(number, rank, got)
                with suppress(OSError):
                    os.write(tell, b"!" * len(running))
                _send(signal.SIGTERM, list(running.values()))
        if deadline == float("inf") and (failed is not None or signal.SIGINT in got):
            deadline = time.monotonic() + _GRACE_S
        if time.monotonic() > deadline:
            _send(signal.SIGKILL, list(running.values()))
        if running:
            time.sleep(_POLL_S)
    return INTERRUPTED if signal.SIGINT in got and failed else failed or 0


def _name_killed(number: int, rank: subprocess.Popen[bytes], got: Sequence[int]) -> None:
    """Prints which rank a signal has ended, because the rank itself could not."""
    if rank.returncode >= 0 or -rank.returncode in got:
        return
    name = signal.Signals(-rank.returncode).name
    cause = (
        "; the machine may be out of memory: see dmesg, and lower model.micro_batch_size" if name == "SIGKILL" else ""
    )
    line = f"tied-lora: rank {number} (process {rank.pid}) was ended by {name}{cause}"
    with suppress(OSError):  # nobody reads
        print(line, file=sys.stderr, flush=True)


@contextmanager
def _passed_on(ranks: Sequence[subprocess.Popen[bytes]]) -> Iterator[list[int]]:
    """Passes signals on to the ranks inside the block. Yields the list of signals that came."""
    got: list[int] = []

    def pass_on(number: int, frame: FrameType | None) -> None:
        got.append(number)
        _send(number, ranks)

    handlers = {number: signal.signal(number, pass_on) for number in _PASSED_ON}
    try:
        yield got
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


def _send(number: int, ranks: Sequence[subprocess.Popen[bytes]]) -> None:
    for rank in ranks:
        rank.send_signal(number)
