# SPDX-License-Identifier: Apache-2.0
"""Runs a stage of the quickstart, which is a `tied-lora` command, and measures the memory of all."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from types import TracebackType
from typing import Any

import psutil

from nemo_tied_lora.launching.local_ranks import exit_code
from nemo_tied_lora.planning.rank_variables import STARTED_BY

__all__ = [
    "MemoryMeter",
    "StageError",
    "run_command",
    "run_stages",
]


class StageError(RuntimeError):
    """A stage's command failed; the message names the command. `code` is its exit code."""

    def __init__(self, message: str, code: int) -> None:
        super().__init__(message)
        self.code = code


def run_stages(command: str, run: Callable[[Mapping[str, Any]], None], cfg: Mapping[str, Any]) -> int:
    """Runs a command that consists of stages. Returns 0, or the exit code of the stage that failed."""
    try:
        run(cfg)
    except StageError as error:
        print(f"tied-lora {command}: {error}", file=sys.stderr)
        return error.code
    return 0


def run_command(arguments: Sequence[str]) -> None:
    """Prints `tied-lora arguments` as a user would type it, and runs it.

    Raises:
        StageError: the command failed.
    """
    print(f"$ tied-lora {shlex.join(arguments)}", flush=True)
    _run([sys.executable, "-m", "nemo_tied_lora.commands.main", *arguments])


class MemoryMeter:
    """Measures the peak of the memory of this process and all its children. Samples until the context ends.

    A page that several processes share is divided among them (proportional set size) if the system reports it, else
    it counts in each process.
    """

    def __init__(self, seconds: float = 0.5) -> None:
        self.peak_bytes = 0
        self._seconds, self._done = seconds, threading.Event()
        self._thread = threading.Thread(target=self._sample, daemon=True)

    def __enter__(self) -> MemoryMeter:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._done.set()
        self._thread.join()

    def _sample(self) -> None:
        me = psutil.Process()
        while not self._done.wait(self._seconds):
            self.peak_bytes = max(self.peak_bytes, sum(map(_resident, [me, *me.children(recursive=True)])))


def _resident(process: psutil.Process) -> int:
    try:
        full = process.memory_full_info()
        return int(getattr(full, "pss", full.rss))
    except psutil.Error:  # the process has ended since it was listed
        return 0


def _run(command: Sequence[str]) -> None:
    environment = {**os.environ, STARTED_BY: str(os.getpid())}
    # With the claim on the quickstart's folder: after a kill it holds until the stage has saved and ended.
    code = exit_code(subprocess.run(command, check=False, env=environment, close_fds=False).returncode)
    if code != 0:
        raise StageError(f"tied-lora {' '.join(command[3:4])} failed with exit code {code}", code)
