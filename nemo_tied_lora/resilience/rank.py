# SPDX-License-Identifier: Apache-2.0
"""Runs one rank from the rendezvous to its exit code. All ranks refuse, stop and finish together."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import FrameType, TracebackType
from typing import TYPE_CHECKING, Any

from nemo_tied_lora.errors import ConfigError, TrainingStopped, report
from nemo_tied_lora.planning.rank_variables import BROKEN_PIPE, INTERRUPTED, another_rank_failed
from nemo_tied_lora.resilience.folder_claim import claim_folder
from nemo_tied_lora.resilience.leaving import end_all, leave_together
from nemo_tied_lora.resilience.other_output import OtherOutput
from nemo_tied_lora.resilience.restarts import Preempted, fingerprint, finished_already, own_folder, restarted
from nemo_tied_lora.resilience.status_file import ENDED, RunStatus, read_status
from nemo_tied_lora.resilience.stop_signals import answered_by, interrupted_by
from nemo_tied_lora.resilience.unforeseen import describe, keep_traceback, say

if TYPE_CHECKING:  # these modules import torch
    from nemo_tied_lora.resilience.dead_rank_watchdog import Watchdog
    from nemo_tied_lora.resilience.rendezvous import Rendezvous

__all__ = ["STOPPED", "Finished", "Rank", "Refused", "run_as_rank"]

STOPPED = 3
"""Exit code of a run that a guard stopped."""

_START_S = 300.0


class Refused(ConfigError):
    """The ranks do not start the run. Every rank raises it."""


class Finished(Exception):
    """The same run has finished before and is not repeated. Every rank raises it."""


def run_as_rank(
    command: str,
    values: Mapping[str, Any],
    problems: Sequence[str],
    work: Callable[[Rank], Any],
    check_on_rank_0: Callable[[], None] | None = None,
    lines: Sequence[str] = (),
) -> int:
    """Runs `work` as one rank of a run; `Rank` describes how it ends.

    Args:
        command: the command's name, for messages.
        values: the composed configuration.
        problems: what this rank found wrong before it met the others.
        work: returns a summary; the summary's "output" names the file that the run wrote.
        check_on_rank_0: see `Rank.start`.
        lines: what rank 0 prints once all ranks have agreed to start.

    Returns:
        The exit code.
    """
    rank = Rank(command, values)
    try:
        with rank:
            rank.start(problems, check_on_rank_0, lines)
            if values.get("preflight") != "only":
                rank.finish(work(rank))
    finally:
        rank.other_output.end(keep=rank.exit_code == 1)
    return rank.exit_code


class Rank:
    """This process as one rank of a run: a context manager around the work.

    Leaving it prints and records how the work ended, waits until all ranks leave, and sets `exit_code`:

    - 0: the work is done, or `Finished`
    - 2: `ConfigError`, `Refused` among them
    - 3 (`STOPPED`): `TrainingStopped`
    - `preemption.exit_code`: `Preempted`
    - any other exception: the watchdog ends all ranks with its own code, 70. Without a watchdog: 1
    """

    def __init__(self, command: str, values: Mapping[str, Any]) -> None:
        self._command, self._values = command, values
        self._watching, self._preemption = values.get("watchdog") or {}, values.get("preemption") or {}
        self._first, self._is_alone = os.environ["RANK"] == "0", os.environ["WORLD_SIZE"] == "1"
        self._rendezvous: Rendezvous | None = None
        self._signals = ExitStack()
        quiet = not values.get("verbose", True)
        self.other_output = OtherOutput(f"{command}-rank-{os.environ['RANK']}", wanted=quiet)
        """What NeMo and others print."""
        self.exit_code = 0
        self.status = RunStatus(None, active=False)
        self.watchdog: Watchdog | None = None
        self.stuck_s: float = self._watching.get("stuck_s", 0)
        """Time limit of a collective, in seconds. 0: torch's own."""
        self.asked_to_stop: str | None = None
        """The stop signal that this rank received."""
        self.can_save = False
        """True from the first step to the last. In this time a stop signal is answered at the start of a step."""

    def __enter__(self) -> Rank:
        self._signals.enter_context(interrupted_by(self._on_interrupt))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> bool:
        with self._signals:
            if isinstance(error, (SystemExit, KeyboardInterrupt, GeneratorExit)):
                return False
            self.exit_code = self._end(error)
        return True

    def start(
        self,
        problems: Sequence[str],
        check_on_rank_0: Callable[[], None] | None = None,
        lines: Sequence[str] = (),
    ) -> None:
        """Meets the other ranks, agrees with them to start, and checks the machines if the pre-flight is on.

        Args:
            problems: this rank's own.
            check_on_rank_0: raises ConfigError for what one rank finds out for all, such as wrong lines of data.
            lines: what rank 0 prints once all ranks have agreed.

        Raises:
            Refused: on every rank, with the problems of all ranks.
            Finished: on every rank; this run has finished before.
        """
        try:
            self._meet(problems, check_on_rank_0)
            self._begin()
            for line in lines:
                self._print(line)
            if self._values.get("preflight"):
                self.status.update(state="preflight")
                self._preflight()
        except ConfigError as error:
            raise Refused(error.problems) from None
        if "preemption" in self._values:
            self._signals.enter_context(answered_by(self._on_signal))

    @contextmanager
    def rank_0_first(self, topic: str) -> Iterator[None]:
        """Rank 0 does what is inside, and the other ranks do it after rank 0, also if rank 0 fails.

        Args:
            topic: names the work in messages. A run uses each topic once.
        """
        if not self._first:
            self._from_rank_0(topic, lambda: None)
        try:
            yield
        finally:
            if self._first:
                self._from_rank_0(topic, lambda: None)

    def finish(self, summary: Any) -> None:
        """Records that the work is done. If `summary` is a mapping, its "output" names the file that was written."""
        output = summary.get("output") if isinstance(summary, Mapping) else None
        self.status.update(now=True, state="finished", output=output and str(Path(output).resolve()))

    def _meet(self, problems: Sequence[str], check_on_rank_0: Callable[[], None] | None) -> None:
        if not self._is_alone:
            from nemo_tied_lora.resilience.rendezvous import Rendezvous

            self._rendezvous = Rendezvous.join(float(self._watching.get("start_s", _START_S)))
            problems = self._rendezvous.agree(problems)
        if problems:
            raise ConfigError(problems)
        if check_on_rank_0 is not None:
            self._from_rank_0("data", check_on_rank_0)
        message = self._from_rank_0("finished", lambda: finished_already(self._values))
        if message is not None:
            raise Finished(message)
        folder = own_folder(self._values)
        if folder is not None:
            self._from_rank_0("folder", lambda: claim_folder(folder))

    def _begin(self) -> None:
        """Starts the status file and, on several ranks, the watchdog and the process group."""
        from nemo_tied_lora.resilience.default_group import make_default_group
        from nemo_tied_lora.resilience.rendezvous import node_name

        values, preemption = self._values, self._preemption
        folder = own_folder(values)
        facts: dict[str, Any] = {"node": node_name(), "pid": os.getpid()}
        if preemption:
            limit = preemption["max_restarts"]
            facts |= self._from_rank_0("restarts", lambda: restarted(folder, fingerprint(values), limit))
        if folder is not None:
            facts |= {"settings": fingerprint(values), "step": 0, "max_steps": values["trainer"]["max_steps"]}
        self.status = RunStatus(folder, active=self._first, **facts)
        self.status.start()
        if self._rendezvous is not None:
            timeout_s = self._watching.get("timeout_s")
            if timeout_s:
                self._start_watchdog(self._rendezvous, timeout_s)
            make_default_group(values, self._rendezvous, self.stuck_s or timeout_s)
        else:
            make_default_group(values, None, None)

    def _start_watchdog(self, rendezvous: Rendezvous, timeout_s: float) -> None:
        from nemo_tied_lora.resilience.dead_rank_watchdog import Watchdog
        from nemo_tied_lora.resilience.rendezvous import connect

        self.watchdog = Watchdog(
            connect(timeout_s, client=True),
            rendezvous.rank,
            rendezvous.world_size,
            timeout_s=timeout_s,
            stuck_s=self.stuck_s,
            on_end=self._record_verdict,
        )
        self.watchdog.start()

    def _preflight(self) -> None:
        """Compares the ranks' software, and tries an all-reduce in every parallel group.

        Raises:
            ConfigError: on every rank, with what any rank found.
        """
        lines = []
        if self._rendezvous is not None:
            from nemo_tied_lora.resilience import group_check, version_check

            version_check.compare(self._rendezvous, self._values)
            lines = [f"the same software and configuration on all {self._rendezvous.world_size} ranks"]
            lines += group_check.check(self._rendezvous, self._values)
        if self._first:
            print("\n".join([f"pre-flight: {line}" for line in [*lines, "all is well"]]), flush=True)

    def _from_rank_0(self, topic: str, compute: Callable[[], Any]) -> Any:
        return compute() if self._rendezvous is None else self._rendezvous.from_rank_0(topic, compute)

    def _end(self, error: BaseException | None) -> int:
        """Prints and records the end, leaves together with the other ranks, and returns the exit code."""
        # Prints before it leaves: a launcher may kill this rank as soon as another has gone.
        if isinstance(error, (ConfigError, TrainingStopped)):
            code = self._report(error)
        elif isinstance(error, Preempted):
            code = self._preemption.get("exit_code", 1)
            self.status.update(now=True, state="preempted", reason=str(error))
            self._print(error)
        elif isinstance(error, Finished):
            code = 0
            self._print(error)
        elif isinstance(error, BrokenPipeError) and error.filename is None:
            return self._nobody_reads()
        elif error is not None:
            return self._fail(error)
        else:
            code = 0
        leave_together(self._rendezvous, self.watchdog, refused=isinstance(error, Refused))
        return code

    def _print(self, message: object, file: Any = None) -> None:
        if self._first:
            print(f"tied-lora {self._command}: {message}", file=file, flush=True)

    def _report(self, error: ConfigError | TrainingStopped) -> int:
        """Prints and records the error on rank 0, because every rank has the same one. Returns the exit code."""
        problems = error.problems if isinstance(error, ConfigError) else (str(error),)
        if self._first:
            self.status.fail("; ".join(problems))
        if isinstance(error, TrainingStopped):
            self._print(error, sys.stderr)
            return STOPPED
        # A rank that could not reach the others has its own problem, and prints it too.
        return report(self._command, error) if self._first or self._rendezvous is None else 2

    def _fail(self, error: BaseException) -> int:
        """Prints one line and ends the run on all ranks. Returns the exit code; with a watchdog, it does not return."""
        from nemo_tied_lora.resilience.rendezvous import node_name

        where = keep_traceback(error, f"{self._command}-rank-{os.environ['RANK']}", self.status.folder)
        who = "" if self._is_alone else f"rank {os.environ['RANK']} on node {node_name()} failed: "
        reason = f"{who}{describe(error, self._command)}; {where}"
        if self.watchdog is not None:
            end_all(self.watchdog, reason, error, self.status.fail)
        self.status.fail(reason)
        say(f"tied-lora {self._command}: {reason}")
        return 1

    def _nobody_reads(self) -> int:
        """Ends the run without a word, as a shell's pipe ends its programs: whoever read the output has gone."""
        reason = "the reader of the output has gone (a closed pipe)"
        if self.watchdog is not None:
            self.watchdog.fail(reason, BROKEN_PIPE)
        self.status.fail(reason)
        return BROKEN_PIPE

    def _record_verdict(self, reason: str, code: int) -> None:
        """Called by the watchdog on one surviving rank, before it ends the run."""
        if code == self._preemption.get("exit_code", 1):
            self.status.update(now=True, state="preempted", reason=reason)
        else:
            self.status.fail(reason)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        """Notes the signal; the run stops at the start of a step. Before the first step it exits: nothing to save."""
        if another_rank_failed():
            self._leave_after_failure()
        name = signal.Signals(number).name
        self.asked_to_stop = name
        if self.can_save or self.status["state"] not in ("starting", "preflight"):
            return
        code = self._preemption["exit_code"]
        reason = f"{name} before the first step: nothing to save; the same command starts it again"
        if self.watchdog is not None:
            self.watchdog.fail(reason, code)  # prints the reason, or another one if the run has ended already
        say(f"tied-lora: rank {os.environ['RANK']}: {reason}")
        self.status.update(now=True, state="preempted", reason=reason)
        os._exit(code)

    def _leave_after_failure(self) -> None:
        """Ends this rank because another one has failed, which has said why, or the launcher has. Does not return."""
        folder = self.status.folder
        if self._first and folder is not None and (read_status(folder) or {}).get("state") not in ENDED:
            self.status.fail("a rank has failed; the run's output says which")
        os._exit(1)

    def _on_interrupt(self) -> None:
        """Ctrl-C: ends all ranks at once. A file that is being written still has its temporary name."""
        saved = self.status["saved_step"]
        reason = f"interrupted; the same command resumes after step {saved}" if saved else "interrupted"
        if self.watchdog is not None:
            self.watchdog.fail(reason, INTERRUPTED)
        self.status.fail(reason)
        if self._first:
            say(f"tied-lora {self._command}: {reason}")
        os._exit(INTERRUPTED)
