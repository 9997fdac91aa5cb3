# SPDX-License-Identifier: Apache-2.0
"""SIGTERM and SIGUSR1 are answered by this process alone: what a library forks from it dies of them, as it would have.

A pool of forked workers ends them by SIGTERM. With a Python handler inherited, a signal that arrives before a worker's
interpreter is set up is forgotten by Python, and the pool waits for that worker for ever. So a fork happens with these
signals blocked, and the child lets them through when their default action is back.
"""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

__all__ = ["STOP_SIGNALS", "answered_by", "ignore_from_now"]

STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1)
"""What SLURM and people send to a run that is to stop."""


@contextmanager
def answered_by(handler: Callable[[int, FrameType | None], None]) -> Iterator[None]:
    """Calls the handler for each of `STOP_SIGNALS` meanwhile; in the main thread only, as `signal.signal`.

    Afterwards the old one is back, but where another was set in between.
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


def ignore_from_now() -> None:
    """To the end of this process, whose exit code is settled.

    srun sends SIGTERM to all others as soon as one rank has ended with a code that is not 0, and reports what they died
    of: a run that is refused would look like one that was stopped, and be started again.
    """
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)


_state = {"registered": False, "answered": False}
_thread = threading.local()


def _register_once() -> None:
    """Hooks of a fork cannot be taken back; they do nothing while nobody answers."""
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
