# SPDX-License-Identifier: Apache-2.0
"""Runs a study: several runs at a time, in the schedule's order, until all is done or time is up."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from pathlib import Path

from nemo_tied_lora.commands.study.cells import Cell
from nemo_tied_lora.commands.study.claims import claim
from nemo_tied_lora.commands.study.commands import CommandFailed, Stopped
from nemo_tied_lora.commands.study.plan import Study
from nemo_tied_lora.commands.study.results import Results, read_results
from nemo_tied_lora.commands.study.schedule import schedule
from nemo_tied_lora.commands.study.time_left import seconds_left
from nemo_tied_lora.errors import ConfigError
from nemo_tied_lora.files import write_json
from nemo_tied_lora.tables import duration

__all__ = ["Outcome", "run_study"]

_FAILURES = 3
"""After so many failures and no success the rest would fail too."""
Run = Callable[[Cell, int], Path]
"""Does a run, given a descriptor that holds its claim; returns the result's file."""


@dataclass
class Outcome:
    """What one `tied-lora compare` did."""

    done: list[Cell] = field(default_factory=list)
    failed: dict[str, str] = field(default_factory=dict)  # label to what happened
    elsewhere: list[Cell] = field(default_factory=list)  # claimed by another process
    stopped: str | None = None  # why no further run was started, although some are left


class _Runner:
    """The state that the threads share."""

    def __init__(
        self,
        study: Study,
        folder_of: Callable[[Cell], Path],
        run: Run,
        at_once: int,
        limit: int | None,
        until: float | None,
    ) -> None:
        self._study, self._folder_of, self._run, self._at_once = study, folder_of, run, at_once
        self._limit, self._until = limit, until
        self._taken: set[str] = set()
        self._working = 0
        self._changed = threading.Condition()
        self.outcome = Outcome()

    def work(self) -> None:
        """Does runs until none is left. Several threads call it."""
        while True:
            with self._changed:
                cell = self._next()
                while cell is None and self._working and self.outcome.stopped is None:
                    self._changed.wait()  # a run of another thread may decide what comes next
                    cell = self._next()
                if cell is None:
                    return
                self._taken.add(cell.key)
                self._working += 1
            try:
                self._do(cell)
            finally:
                with self._changed:
                    self._working -= 1
                    self._changed.notify_all()

    def _next(self) -> Cell | None:
        """The first run that nobody has done or is doing. None: there is none now, or no further one may start."""
        left = self.left(read_results(Path(self._study.results)))
        if not left:
            return None
        self.outcome.stopped = self.outcome.stopped or self._why_no_more()
        return None if self.outcome.stopped else left[0]

    def _why_no_more(self) -> str | None:
        started = len(self._taken) - len(self.outcome.elsewhere)
        if self._limit is not None and started >= self._limit:
            return f"limit={self._limit}: so many runs were started"
        if self._until is not None and time.monotonic() >= self._until:
            return "the time of minutes= is up"
        if len(self.outcome.failed) >= _FAILURES and not self.outcome.done:
            return f"the first {_FAILURES} runs failed"
        return None

    def left(self, results: Results) -> list[Cell]:
        """The runs without a result that this process has not taken."""
        cells = schedule(self._study, results.losses()).cells
        return [cell for cell in cells if cell not in results and cell.key not in self._taken]

    def _do(self, cell: Cell) -> None:
        place = self._folder_of(cell)
        with claim(place) as claimed:
            if claimed is None:
                self.outcome.elsewhere.append(cell)
                self._say(f"{cell.label}: another process is doing it")
                return
            if cell in read_results(Path(self._study.results)):  # another process has done it since we looked
                return
            self._say(f"{cell.label}: started")
            began = time.monotonic()
            try:
                self._run(cell, claimed)
            except Stopped:
                self.outcome.stopped = "stopped"
            except (CommandFailed, ConfigError) as failure:
                self.outcome.failed[cell.label] = str(failure)
                write_json(place / "failed.json", {"failure": str(failure)})
                self._say(f"{cell.label}: failed with {failure}")
            else:
                (place / "failed.json").unlink(missing_ok=True)
                self.outcome.done.append(cell)
                self._say(f"{cell.label}: done in {duration(time.monotonic() - began)}{self._outlook()}")

    def _outlook(self) -> str:
        results = read_results(Path(self._study.results))
        plan = schedule(self._study, results.losses())
        total = len(plan.cells) + sum(one.runs for one in plan.waiting)
        seconds = seconds_left(plan, results, self._at_once)
        left = f", about {duration(seconds)} left" if seconds is not None else ""
        return f"; {sum(cell in results for cell in plan.cells)} of {total} runs{left}"

    def _say(self, text: str) -> None:
        print(text, flush=True)


def run_study(
    study: Study,
    folder_of: Callable[[Cell], Path],
    run: Run,
    stop: Callable[[], None],
    *,
    at_once: int,
    limit: int | None = None,
    minutes: float | None = None,
) -> Outcome:
    """Does the runs of a study that have no result, `at_once` at a time.

    Args:
        folder_of: a run's folder, for its claim.
        run: does a run.
        stop: asks all runs to end; called on Ctrl-C or SIGTERM, before KeyboardInterrupt is raised again.
        limit: start at most so many runs.
        minutes: start no further run after this time.
    """
    until = None if minutes is None else time.monotonic() + 60 * minutes
    runner = _Runner(study, folder_of, run, at_once, limit, until)
    with ThreadPoolExecutor(at_once) as pool:
        working = [pool.submit(runner.work) for _ in range(at_once)]
        try:
            wait(working, return_when=FIRST_EXCEPTION)
            for one in working:
                one.result()
        except BaseException:  # Ctrl-C and SIGTERM too
            runner.outcome.stopped = "stopped"
            stop()
            raise
    return runner.outcome
