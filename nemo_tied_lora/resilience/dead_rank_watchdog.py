# SPDX-License-Identifier: Apache-2.0
"""Ends the run on all ranks if a rank dies or hangs, with an error that names the rank.

A thread of each rank writes a heartbeat to the ranks' store. Rank 0 reads all heartbeats; the others read rank 0's. That is
two reads per rank and heartbeat, for any number of ranks. Each reader uses only its own clock, so clocks need not agree.
Three things end a run:

- a heartbeat does not change for `timeout_s`: the process is dead or stopped
- no rank makes progress for `stuck_s` in training: the error names the ranks that are not waiting for others
- a rank reports that it failed

The verdict is written to the store. Every rank prints it and exits with `EXIT_CODE`, whatever its main thread waits for: a
collective whose peer is dead cannot be interrupted in another way.
"""

from __future__ import annotations

import json
import os
import sys
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from types import FrameType
from typing import Any

from torch.distributed import Store

from nemo_tied_lora.planning.rank_variables import BROKEN_PIPE, LAUNCHER
from nemo_tied_lora.resilience.rendezvous import node_name
from nemo_tied_lora.resilience.unforeseen import say

__all__ = ["EXIT_CODE", "Watchdog"]

EXIT_CODE = 70
"""Exit code of ranks that the watchdog ends (EX_SOFTWARE of sysexits.h)."""

_BEAT_S = 5.0
_FAREWELL_S = 3.0
_NAMED = 8
_WAITING = ("torch/distributed", "megatron/core/pipeline_parallel/p2p_communication", "lightning/fabric/strategies")


class Watchdog:
    """The watchdog of one rank.

    Args:
        store: a separate connection, because the main thread may wait in another.
        timeout_s: seconds without a heartbeat after which a rank counts as dead.
        stuck_s: seconds without progress in training after which the run counts as stuck. 0: never.
        on_end: called on one surviving rank before it exits, with the reason and the exit code.
    """

    def __init__(
        self,
        store: Store,
        rank: int,
        world_size: int,
        *,
        timeout_s: float,
        stuck_s: float = 0,
        on_end: Callable[[str, int], None] = lambda reason, code: None,
    ) -> None:
        self._store, self._rank, self._world = store, rank, world_size
        self._timeout_s, self._stuck_s = timeout_s, stuck_s
        self._on_end = on_end
        self._every = min(_BEAT_S, timeout_s / 5)
        self._main = threading.main_thread().ident
        self._position, self._place, self._watched = 0, "start", False
        self._count, self._done, self._ending = 0, threading.Event(), threading.Lock()
        self._round_ended = self._last_check = time.monotonic()
        # rank: (heartbeat, when this rank last saw it change)
        self._seen: dict[int, tuple[int, float]] = {}
        self._moved = (-1, time.monotonic())
        self._threads = [
            threading.Thread(target=part, daemon=True) for part in (self._exchange_heartbeats, self._watch_store)
        ]

    def start(self) -> None:
        """Starts the threads. All ranks call it; it waits for no other rank."""
        self._write_heartbeat()
        for thread in self._threads:
            thread.start()

    def moved(self, place: str, *, watched: bool = True) -> None:
        """Records progress of the main thread. `watched`: from now on, no progress for `stuck_s` is an error."""
        self._position, self._place, self._watched = self._position + 1, place, watched

    def stop(self) -> None:
        """Stops watching, because this rank's work is done. The others no longer expect its heartbeat."""
        if self._done.is_set():
            return
        self._done.set()
        self._store.set(f"beat/{self._rank}", json.dumps({"done": True}))
        for thread in self._threads:
            if thread is not threading.current_thread() and thread.is_alive():
                thread.join(timeout=self._every + 1)

    def fail(self, reason: str, code: int = EXIT_CODE) -> None:
        """Ends the run on all ranks. Does not return.

        Args:
            code: the exit code of every rank.
        """
        self._store.compare_set(
            "verdict", "", json.dumps({"reason": reason, "code": code, "gone": [], "by": self._rank})
        )
        self._end(json.loads(self._store.get("verdict")))

    def fail_after_peers(self, reason: str) -> None:
        """Like `fail`, for an error that another rank's death may have caused. Waits, so that the dead rank can be named."""
        # A dead rank is found within timeout_s and three rounds. Twice as many rounds, for a busy machine.
        deadline = time.monotonic() + self._timeout_s + 6 * self._every
        while time.monotonic() < deadline:
            time.sleep(self._every / 4)
        self.fail(reason)

    def _exchange_heartbeats(self) -> None:
        """Thread: writes and reads heartbeats until the end. A store error means that the store's process is gone."""
        while not self._done.wait(self._every):
            try:
                self._write_heartbeat()
                self._check_heartbeats()
            except RuntimeError as error:
                if not self._done.is_set():
                    self._store_lost(str(error).splitlines()[0])
                return
            self._round_ended = time.monotonic()

    def _watch_store(self) -> None:
        """Thread: watches the store itself. A stopped process keeps its connections, so a read from it waits for ever."""
        before = time.monotonic()
        while not self._done.wait(self._every):
            now = time.monotonic()
            if self._was_suspended(before, now):
                self._round_ended = now
            before = now
            if now - self._round_ended > self._timeout_s:
                self._store_lost(f"no answer for {self._timeout_s:.0f} s")
                return

    def _was_suspended(self, before: float, now: float) -> bool:
        """Whether this process itself was suspended, as by `scontrol suspend`. Then the others need time too."""
        return now - before > self._every + self._timeout_s / 2

    def _write_heartbeat(self) -> None:
        self._count += 1
        where = _main_frames(self._main)
        beat = {"count": self._count, "position": self._position, "place": self._place, "watched": self._watched}
        beat |= {"node": node_name(), "pid": os.getpid(), "where": where[0], "waiting": where[1]}
        self._store.set(f"beat/{self._rank}", json.dumps(beat))

    def _check_heartbeats(self) -> None:
        if self._store.check(["verdict"]):
            self._end(json.loads(self._store.get("verdict")))
        watched = range(self._world) if self._rank == 0 else [0]
        now = time.monotonic()
        if self._was_suspended(self._last_check, now):  # what this rank knows is too old
            self._seen, self._moved = {}, (-1, now)
        self._last_check = now
        beats = self._read_heartbeats([rank for rank in watched if rank != self._rank])
        for rank, beat in beats.items():
            if rank not in self._seen or self._seen[rank][0] != beat.get("count"):
                self._seen[rank] = (beat.get("count"), now)
        running = [rank for rank, beat in beats.items() if not beat.get("done")]
        silent = [rank for rank in running if now - self._seen[rank][1] > self._timeout_s]
        if silent:
            named = ", ".join(_rank_name(rank, beats[rank]) for rank in silent[:_NAMED])
            self._record_verdict(silent, f"{named}: no sign of life for {self._timeout_s:.0f} s; dead or stopped")
        elif self._rank == 0:
            self._check_progress(beats, now)

    def _check_progress(self, beats: Mapping[int, Any], now: float) -> None:
        mine = {"position": self._position, "place": self._place, "watched": self._watched}
        where = _main_frames(self._main)
        mine |= {"node": node_name(), "pid": os.getpid(), "where": where[0], "waiting": where[1]}
        everyone = {0: mine, **{rank: beat for rank, beat in beats.items() if not beat.get("done")}}
        total = sum(beat["position"] for beat in everyone.values())
        if total != self._moved[0]:
            self._moved = (total, now)
        watched = self._stuck_s and all(beat["watched"] for beat in everyone.values())
        if watched and now - self._moved[1] > self._stuck_s:
            busy = [rank for rank, beat in everyone.items() if not beat["waiting"]] or list(everyone)
            named = [f"{_rank_name(rank, everyone[rank])} in {everyone[rank]['where']}" for rank in busy[:_NAMED]]
            reason = (
                f"no step for {self._stuck_s:.0f} s at {mine['place']}; not waiting for others: {', '.join(named)}"
            )
            self._record_verdict([], reason)

    def _read_heartbeats(self, ranks: list[int]) -> dict[int, Any]:
        """Returns the heartbeats of the ranks that have started."""
        keys = [f"beat/{rank}" for rank in ranks]
        if not keys:
            return {}
        if not self._store.check(keys):  # the rendezvous names a rank that never started
            present = [key for key in keys if self._store.check([key])]
            ranks, keys = [rank for rank, key in zip(ranks, keys, strict=True) if key in present], present
        return {rank: json.loads(value) for rank, value in zip(ranks, self._store.multi_get(keys), strict=True)}

    def _record_verdict(self, gone: list[int], reason: str) -> None:
        verdict = {"reason": reason, "code": EXIT_CODE, "gone": gone, "by": self._rank}
        self._store.compare_set("verdict", "", json.dumps(verdict))
        self._end(json.loads(self._store.get("verdict")))

    def _store_lost(self, problem: str) -> None:
        holder = "torchrun" if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True" else "rank 0"
        where = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
        reason = f"{holder}, which holds the ranks' store at {where}: dead or stopped ({problem})"
        self._end({"reason": reason, "code": EXIT_CODE, "gone": [0]}, reachable=False)

    def _end(self, verdict: Mapping[str, Any], *, reachable: bool = True) -> None:
        """Prints the verdict and exits. Rank 0 exits last, because the others read the verdict from its store."""
        with self._ending:  # never released: the first thread here ends the process
            reason, gone, code = str(verdict["reason"]), verdict["gone"], int(verdict["code"])
            survivors = [rank for rank in range(self._world) if rank not in gone] or [0]
            # Under srun each rank, or each node, has a log of its own. The ranks of our own launcher share one.
            if code != BROKEN_PIPE and (verdict.get("by", survivors[0]) == self._rank or LAUNCHER not in os.environ):
                say(f"tied-lora: rank {self._rank}: the run ends: {reason}")
            if self._rank == survivors[0]:
                _try(lambda: self._on_end(reason, code))
            if reachable:
                _try(lambda: self._wait_for_others(len(gone)))
            os._exit(code)

    def _wait_for_others(self, gone: int) -> None:
        self._store.add("farewells", 1)
        deadline = time.monotonic() + _FAREWELL_S + 2 * self._every
        while self._rank == 0 and time.monotonic() < deadline:
            if self._store.add("farewells", 0) >= self._world - gone:
                return
            time.sleep(0.1)


def _main_frames(ident: int | None) -> tuple[str, bool]:
    """Returns (the main thread's innermost line, whether it waits in a collective)."""
    frame: FrameType | None = sys._current_frames().get(ident or 0)
    if frame is None:
        return "unknown", False
    innermost = f"{Path(frame.f_code.co_filename).name}:{frame.f_lineno} {frame.f_code.co_name}"
    depth = 0
    while frame is not None and depth < 6:  # torch.distributed wraps its calls in decorators
        if any(part in frame.f_code.co_filename for part in _WAITING):
            return innermost, True
        frame, depth = frame.f_back, depth + 1
    return innermost, False


def _rank_name(rank: int, beat: Mapping[str, Any]) -> str:
    return f"rank {rank} (node {beat.get('node')}, process {beat.get('pid')})"


def _try(action: Callable[[], Any]) -> None:
    """Calls `action` on the way out. Prints its error and continues."""
    try:
        action()
    except Exception as error:
        say(f"tied-lora: {error}")
