# SPDX-License-Identifier: Apache-2.0
"""Runs `tied-lora` commands beside each other, and ends them together."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path

from nemo_tied_lora.launching.local_ranks import exit_code

__all__ = ["CommandFailed", "Commands", "Stopped"]

_GRACE_S = 120.0
"""A training that is asked to stop ends its step, saves and exits. A step of the largest batch takes seconds."""


class CommandFailed(RuntimeError):
    """A command returned another code than 0. `code` is its exit code, `log` its output, whose end is the message."""

    def __init__(self, code: int, log: Path) -> None:
        lines = log.read_text(errors="replace").strip().splitlines()
        last = f" ({lines[-1].strip()})" if lines else ""
        super().__init__(f"exit code {code}{last}; its output is in {log}")
        self.code, self.log = code, log


class Stopped(RuntimeError):
    """The command was asked to stop, or was not started any more."""


class Commands:
    """Starts commands from several threads. `stop` asks all of them to end.

    Args:
        threads: OMP_NUM_THREADS of each command.
        start: what runs `tied-lora`, before its arguments.
    """

    def __init__(
        self, threads: int, start: Sequence[str] = (sys.executable, "-m", "nemo_tied_lora.commands.main")
    ) -> None:
        self._start, self._threads = list(start), threads
        self._running: set[subprocess.Popen[bytes]] = set()
        self._stopped, self._lock = False, threading.Lock()

    def run(self, arguments: Sequence[str], log: Path, claim: int) -> float:
        """Runs `tied-lora arguments`; returns the seconds that it took.

        Args:
            log: the file for its output, which is replaced.
            claim: a descriptor that the command keeps open, so that what it claims stays claimed while it runs.

        Raises:
            CommandFailed: the command failed.
            Stopped: `stop` was called.
        """
        began = time.perf_counter()
        environment = {**os.environ, "OMP_NUM_THREADS": str(self._threads)}
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("wb") as file:
            with self._lock:
                if self._stopped:
                    raise Stopped
                # A session of its own: Ctrl-C reaches only this process, which asks the commands to save and stop.
                process = subprocess.Popen(
                    [*self._start, *arguments],
                    env=environment,
                    stdin=subprocess.DEVNULL,
                    stdout=file,
                    stderr=subprocess.STDOUT,
                    start_new_session=True,
                    pass_fds=(claim,),
                )
                self._running.add(process)
            try:
                code = exit_code(process.wait())
            finally:
                with self._lock:
                    self._running.discard(process)
        if code != 0:
            if self._stopped:
                raise Stopped
            raise CommandFailed(code, log)
        return time.perf_counter() - began

    def stop(self) -> None:
        """Asks all commands to end, and kills those that have not after two minutes. No further one starts."""
        with self._lock:
            self._stopped = True
            running = list(self._running)
        for process in running:
            process.terminate()  # alone: it passes the signal on to its ranks
        deadline = time.monotonic() + _GRACE_S
        try:
            while time.monotonic() < deadline and any(process.poll() is None for process in running):
                time.sleep(0.1)
        finally:
            for process in running:
                if process.poll() is None:
                    os.killpg(process.pid, signal.SIGKILL)
