# SPDX-License-Identifier: Apache-2.0
"""A rank that dies or stands still ends the run on all ranks, with an error that names it.

Each rank sets a beat in the ranks' store from a thread of its own. Rank 0 watches all beats, the others watch rank 0's:
two reads a rank and beat, however many ranks there are. Counters are compared with the reader's clock, so that clocks need
not agree. Three things end a run:

- a beat that does not change for `timeout_s`: the process is gone, or stopped;
- no rank that gets on for `stuck_s` while it trains: the ranks that are not waiting for others are named;
- a rank that says it failed.

The verdict is left in the store; every rank prints it and exits with `EXIT_CODE`, whatever its main thread is waiting
for: a collective whose peer is gone cannot be interrupted otherwise.
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

from nemo_tied_lora.resilience.rendezvous import node_name

__all__ = ["EXIT_CODE", "Watchdog"]

EXIT_CODE = 70
"""Of ranks that the watchdog ends (sysexits' EX_SOFTWARE)."""

_BEAT_S = 5.0
_FAREWELL_S = 3.0
_NAMED = 8
_WAITING = ("torch/distributed", "megatron/core/pipeline_parallel/p2p_communication", "lightning/fabric/strategies")


class Watchdog:
    """One rank's part.

    Args:
        store: a connection of its own: the main thread may wait in another.
        timeout_s: silence after which a rank counts as gone; 0: never looked at.
        stuck_s: standstill in training after which the run counts as stuck; 0: never.
        on_end: called with the reason and the exit code, on one surviving rank, before it exits.
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
        self._round_ended = self._looked = time.monotonic()
        # rank: (beat, when it last changed here)
        self._seen: dict[int, tuple[int, float]] = {}
        self._moved = (-1, time.monotonic())
        self._threads = [threading.Thread(target=part, daemon=True) for part in (self._talk, self._judge)]

    def start(self) -> None:
        """Called by every rank; each waits for nobody."""
        self._beat()
        for thread in self._threads:
            thread.start()

    def moved(self, place: str, *, watched: bool = True) -> None:
        """The main thread got on. `watched`: from now on standing still for `stuck_s` is an error."""
        self._position, self._place, self._watched = self._position + 1, place, watched

    def stop(self) -> None:
        """This rank's work is done; its silence means nothing any more."""
        if self._done.is_set():
            return
        self._done.set()
        self._store.set(f"beat/{self._rank}", json.dumps({"done": True}))
        for thread in self._threads:
            if thread is not threading.current_thread() and thread.is_alive():
                thread.join(timeout=self._every + 1)

    def fail(self, reason: str, code: int = EXIT_CODE) -> None:
        """Ends the run on all ranks; does not return.

        Args:
            code: what every rank exits with.
        """
        self._store.compare_set("verdict", "", json.dumps({"reason": reason, "code": code, "gone": []}))
        self._end(json.loads(self._store.get("verdict")))

    def fail_after_peers(self, reason: str) -> None:
        """As `fail`, for an error that another rank's death may have caused: that rank is to be named, if there is one."""
        # Silence is found within timeout_s and three rounds; as much again for a machine that is busy.
        deadline = time.monotonic() + self._timeout_s + 6 * self._every
        while time.monotonic() < deadline:
            time.sleep(self._every / 4)
        self.fail(reason)

    def _talk(self) -> None:
        """Beats and looks, until the end. Errors of the store mean that whoever holds it is gone."""
        while not self._done.wait(self._every):
            try:
                self._beat()
                self._look()
            except RuntimeError as error:
                if not self._done.is_set():
                    self._store_lost(str(error).splitlines()[0])
                return
            self._round_ended = time.monotonic()

    def _judge(self) -> None:
        """The store's own silence: a stopped process keeps its connections, and a read from it waits for ever."""
        before = time.monotonic()
        while not self._done.wait(self._every):
            now = time.monotonic()
            if self._slept(before, now):
                self._round_ended = now
            before = now
            if now - self._round_ended > self._timeout_s:
                self._store_lost(f"no answer for {self._timeout_s:.0f} s")
                return

    def _slept(self, before: float, now: float) -> bool:
        """Whether it was this process that stood still, as under `scontrol suspend`: then the others need time too."""
        return now - before > self._every + self._timeout_s / 2

    def _beat(self) -> None:
        self._count += 1
        where = _main_frames(self._main)
        beat = {"count": self._count, "position": self._position, "place": self._place, "watched": self._watched}
        beat |= {"node": node_name(), "pid": os.getpid(), "where": where[0], "waiting": where[1]}
        self._store.set(f"beat/{self._rank}", json.dumps(beat))

    def _look(self) -> None:
        if self._store.check(["verdict"]):
            self._end(json.loads(self._store.get("verdict")))
        watched = range(self._world) if self._rank == 0 else [0]
        now = time.monotonic()
        if self._slept(self._looked, now):  # what it knew is too old
            self._seen, self._moved = {}, (-1, now)
        self._looked = now
        beats = self._beats([rank for rank in watched if rank != self._rank])
        for rank, beat in beats.items():
            if rank not in self._seen or self._seen[rank][0] != beat.get("count"):
                self._seen[rank] = (beat.get("count"), now)
        running = [rank for rank, beat in beats.items() if not beat.get("done")]
        silent = [rank for rank in running if now - self._seen[rank][1] > self._timeout_s]
        if silent:
            named = ", ".join(_called(rank, beats[rank]) for rank in silent[:_NAMED])
            self._pass_verdict(silent, f"{named}: no sign of life for {self._timeout_s:.0f} s; gone, or stopped")
        elif self._rank == 0:
            self._look_for_standstill(beats, now)

    def _look_for_standstill(self, beats: Mapping[int, Any], now: float) -> None:
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
            named = [f"{_called(rank, everyone[rank])} in {everyone[rank]['where']}" for rank in busy[:_NAMED]]
            reason = (
                f"no step for {self._stuck_s:.0f} s at {mine['place']}; not waiting for others: {', '.join(named)}"
            )
            self._pass_verdict([], reason)

    def _beats(self, ranks: list[int]) -> dict[int, Any]:
        """Those that have begun."""
        keys = [f"beat/{rank}" for rank in ranks]
        if not keys:
            return {}
        if not self._store.check(keys):  # one that never began is named when the ranks meet
            there = [key for key in keys if self._store.check([key])]
            ranks, keys = [rank for rank, key in zip(ranks, keys, strict=True) if key in there], there
        return {rank: json.loads(value) for rank, value in zip(ranks, self._store.multi_get(keys), strict=True)}

    def _pass_verdict(self, gone: list[int], reason: str) -> None:
        self._store.compare_set("verdict", "", json.dumps({"reason": reason, "code": EXIT_CODE, "gone": gone}))
        self._end(json.loads(self._store.get("verdict")))

    def _store_lost(self, problem: str) -> None:
        holder = "torchrun" if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True" else "rank 0"
        where = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
        reason = f"{holder}, which holds the ranks' store at {where}: gone, or stopped ({problem})"
        self._end({"reason": reason, "code": EXIT_CODE, "gone": [0]}, reachable=False)

    def _end(self, verdict: Mapping[str, Any], *, reachable: bool = True) -> None:
        """Prints the verdict and exits; rank 0, whose store the others read it from, last."""
        with self._ending:  # for ever: the first thread that comes takes the process with it
            reason, gone = str(verdict["reason"]), verdict["gone"]
            print(f"tied-lora: rank {self._rank}: the run ends: {reason}", file=sys.stderr, flush=True)
            survivors = [rank for rank in range(self._world) if rank not in gone] or [0]
            if self._rank == survivors[0]:
                _try(lambda: self._on_end(reason, int(verdict["code"])))
            if reachable:
                _try(lambda: self._say_farewell(len(gone)))
            os._exit(int(verdict["code"]))

    def _say_farewell(self, gone: int) -> None:
        self._store.add("farewells", 1)
        deadline = time.monotonic() + _FAREWELL_S + 2 * self._every
        while self._rank == 0 and time.monotonic() < deadline:
            if self._store.add("farewells", 0) >= self._world - gone:
                return
            time.sleep(0.1)


def _main_frames(ident: int | None) -> tuple[str, bool]:
    """(the main thread's innermost line, whether it is waiting in a collective)."""
    frame: FrameType | None = sys._current_frames().get(ident or 0)
    if frame is None:
        return "unknown", False
    innermost = f"{Path(frame.f_code.co_filename).name}:{frame.f_lineno} {frame.f_code.co_name}"
    depth = 0
    while frame is not None and depth < 6:  # decorators of torch.distributed stand around its calls
        if any(part in frame.f_code.co_filename for part in _WAITING):
            return innermost, True
        frame, depth = frame.f_back, depth + 1
    return innermost, False


def _called(rank: int, beat: Mapping[str, Any]) -> str:
    return f"rank {rank} (node {beat.get('node')}, process {beat.get('pid')})"


def _try(action: Callable[[], Any]) -> None:
    """What is worth trying on the way out, and no reason to stay."""
    try:
        action()
    except Exception as error:
        print(f"tied-lora: {error}", file=sys.stderr, flush=True)
