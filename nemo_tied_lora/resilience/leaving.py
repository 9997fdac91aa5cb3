# SPDX-License-Identifier: Apache-2.0
"""How the ranks of a run leave together, and how one rank's error ends the others."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from typing import TYPE_CHECKING

from nemo_tied_lora.resilience.stop_signals import ignore_from_now

if TYPE_CHECKING:  # these modules import torch
    from nemo_tied_lora.resilience.dead_rank_watchdog import Watchdog
    from nemo_tied_lora.resilience.rendezvous import Rendezvous

__all__ = ["end_all", "leave_together"]

_GONE_S = 10.0


def leave_together(rendezvous: Rendezvous | None, watchdog: Watchdog | None, *, refused: bool) -> None:
    """Waits until all ranks leave: rank 0 holds the store that the others use.

    Args:
        refused: a collective of the pre-flight may hang, and cannot be cancelled. So no collective is called, and a rank
            that has a process group exits here.
    """
    ignore_from_now()
    if watchdog is not None:
        watchdog.stop()
    has_group = "torch" in sys.modules and sys.modules["torch"].distributed.is_initialized()
    if has_group and not refused:
        import torch

        # A rank that exits while its groups' threads run may be aborted, after its work is done.
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()
    elif rendezvous is not None:
        _wait_for_all(rendezvous)
    if has_group and refused:
        with suppress(OSError, ValueError, AttributeError):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(2)


def end_all(watchdog: Watchdog, reason: str, error: BaseException, record: Callable[[str], None]) -> None:
    """Prints and records this rank's error as the reason, and ends the run on all ranks. Does not return."""
    if _is_of_network(error):
        watchdog.fail_after_peers(reason)
    record(reason)
    watchdog.fail(reason)


def _wait_for_all(rendezvous: Rendezvous) -> None:
    """Waits, for at most `_GONE_S` seconds, until all ranks are about to leave.

    All ranks ignore stop signals by now. So a launcher that ends the others when the first rank leaves changes no exit
    code.
    """
    deadline = time.monotonic() + _GONE_S
    with suppress(RuntimeError):  # rank 0 has left, so all ranks have been here
        rendezvous.store.add("gone", 1)
        while rendezvous.store.add("gone", 0) < rendezvous.world_size and time.monotonic() < deadline:
            time.sleep(0.1)


def _is_of_network(error: BaseException) -> bool:
    """Whether another rank's death may have caused the error. torch raises plain RuntimeErrors for most of these."""
    import torch

    marks = ("gloo", "nccl", "connection", "socket", "timed out", "timeout", "peer")
    known = isinstance(error, (RuntimeError, torch.distributed.DistError))
    return known and any(mark in str(error).lower() for mark in marks)
