# SPDX-License-Identifier: Apache-2.0
"""Handles SIGTERM and SIGUSR1 in this process only. They still end a process that a library forks from it.

A pool of forked workers ends its workers with SIGTERM. If a worker inherits a Python handler, and the signal arrives before
the worker's interpreter is set up, Python loses the signal, and the pool waits for that worker for ever. So a fork happens
with these signals blocked, and the child unblocks them after it has restored their default action.
"""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

__all__ = ["STOP_SIGNALS", "answered_by", "ignore_from_now", "interrupted_by"]

STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1)
"""The signals with which SLURM and people stop a run."""


@contextmanager
def answered_by(handler: Callable[[int, FrameType | None], None]) -> Iterator[None]:
    """Calls `handler` for each of `STOP_SIGNALS` inside the block. Like `signal.signal`, it works in the main thread only.

    At the end it restores the old handler, unless someone has set another one in the meantime.
    """
    _register_once()
    previous = {number: signal.signal(number, handler) for number in STOP_SIGNALS}
    _state["answered"] = True
    try:
        yield
    finally:
        _state["answered"] = False
        for number, before in previous.items():
            if signal.getsignal(number) is handler:
                signal.signal(number, before)


@contextmanager
def interrupted_by(handler: Callable[[], None]) -> Iterator[None]:
    """Calls `handler` for Ctrl-C (SIGINT) inside the block, instead of raising KeyboardInterrupt in the middle of the work.

    A process that is forked inside the block ends at once. Works in the main thread only.
    """
    owner = os.getpid()

    def answer(number: int, frame: FrameType | None) -> None:
        if os.getpid() != owner:
            os._exit(128 + number)
        handler()

    previous = signal.signal(signal.SIGINT, answer)
    try:
        yield
    finally:
        if signal.getsignal(signal.SIGINT) is answer:
            signal.signal(signal.SIGINT, previous)


def ignore_from_now() -> None:
    """Ignores `STOP_SIGNALS` until this process ends, because its exit code is decided.

    As soon as one rank exits with another code than 0, srun sends SIGTERM to the others and reports their exit codes. A
    refused run would look like a stopped one, and would be started again.
    """
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)


_state = {"registered": False, "answered": False}
_thread = threading.local()


def _register_once() -> None:
    """Registers the fork hooks once, because they cannot be removed. They do nothing while no handler is set."""
    if not _state["registered"]:
        os.register_at_fork(before=_before, after_in_parent=_after, after_in_child=_in_child)
        _state["registered"] = True


def _before() -> None:
    if _state["answered"]:
        _thread.mask = signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)


def _after() -> None:
    mask = _thread.__dict__.pop("mask", None)
    if mask is not None:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)


def _in_child() -> None:
    if _state["answered"]:
        _state["answered"] = False
        for number in STOP_SIGNALS:
            signal.signal(number, signal.SIG_DFL)
    _after()
