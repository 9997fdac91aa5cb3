# SPDX-License-Identifier: Apache-2.0
"""Runs one rank from the rendezvous to its exit code. All ranks refuse, stop and finish together."""

from __future__ import annotations

import datetime
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, suppress
from pathlib import Path
from types import FrameType, TracebackType
from typing import TYPE_CHECKING, Any

from nemo_tied_lora.errors import ConfigError, TrainingStopped, report
from nemo_tied_lora.planning.run_settings import run_folder
from nemo_tied_lora.resilience.restarts import Preempted, fingerprint, finished_already, restarted
from nemo_tied_lora.resilience.status_file import RunStatus
from nemo_tied_lora.resilience.stop_signals import answered_by, ignore_from_now

if TYPE_CHECKING:  # these modules import torch
    from nemo_tied_lora.resilience.dead_rank_watchdog import Watchdog
    from nemo_tied_lora.resilience.rendezvous import Rendezvous

__all__ = ["STOPPED", "Finished", "Rank", "Refused", "run_as_rank"]

STOPPED = 3
"""Exit code of a run that a guard stopped."""

_START_S = 300.0
_GONE_S = 10.0


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
    with Rank(command, values) as rank:
        rank.start(problems, check_on_rank_0, lines)
        if values.get("preflight") != "only":
            rank.finish(work(rank))
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
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> bool:
        with self._signals:
            if error is not None and not isinstance(error, Exception):
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

    def _begin(self) -> None:
        """Starts the status file and, on several ranks, the watchdog and the process group."""
        from nemo_tied_lora.resilience.rendezvous import node_name

        values, preemption = self._values, self._preemption
        is_a_run = "preemption" in values and values["preflight"] != "only"
        folder = run_folder(values) if is_a_run else None
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
            self._make_process_group(self._rendezvous, self.stuck_s or timeout_s)

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

    def _make_process_group(self, rendezvous: Rendezvous, seconds: float | None) -> None:
        """Makes the default process group over the ranks' store, before Lightning does; Lightning then uses it.

        Lightning would listen at MASTER_PORT, where rank 0 already has the ranks' store unless torchrun holds one.

        Args:
            seconds: time limit of a collective. None or 0: torch's own.
        """
        import torch
        from torch.distributed import PrefixStore

        from nemo_tied_lora.platform.devices import select_device

        device = select_device(self._values["trainer"].get("accelerator"))
        torch.distributed.init_process_group(
            "nccl" if device.type == "cuda" else "gloo",
            store=PrefixStore("process_group", rendezvous.store),
            rank=rendezvous.rank,
            world_size=rendezvous.world_size,
            timeout=datetime.timedelta(seconds=seconds) if seconds else None,
        )

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

    def _end(self, error: Exception | None) -> int:
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
        elif error is not None:
            self._fail(error)
            return 1
        else:
            code = 0
        self._leave(refused=isinstance(error, Refused))
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

    def _fail(self, error: Exception) -> None:
        """Prints the traceback and ends the run on all ranks. With a watchdog, it does not return."""
        traceback.print_exception(error)
        sys.stderr.flush()
        first_line = (str(error).strip().splitlines() or [""])[0]
        reason = f"rank {os.environ['RANK']} failed: {type(error).__name__}: {first_line}"
        if self.watchdog is None:
            self.status.fail(reason)
        elif _is_of_network(error):
            self.watchdog.fail_after_peers(reason)
        else:
            self.watchdog.fail(reason)

    def _leave(self, *, refused: bool) -> None:
        """Waits until all ranks leave: rank 0 holds the store that the others use.

        Args:
            refused: a collective of the pre-flight may hang, and cannot be cancelled. So no collective is called, and
                a rank that has a process group exits here.
        """
        ignore_from_now()
        if self.watchdog is not None:
            self.watchdog.stop()
        has_group = "torch" in sys.modules and sys.modules["torch"].distributed.is_initialized()
        if has_group and not refused:
            import torch

            # A rank that exits while its groups' threads run may be aborted, after its work is done.
            torch.distributed.barrier()
            torch.distributed.destroy_process_group()
        elif self._rendezvous is not None:
            self._wait_for_all(self._rendezvous)
        if has_group and refused:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(2)

    def _wait_for_all(self, rendezvous: Rendezvous) -> None:
        """Waits, for at most `_GONE_S` seconds, until all ranks are about to leave.

        All ranks ignore stop signals by now. So a launcher that ends the others when the first rank leaves changes no
        exit code.
        """
        deadline = time.monotonic() + _GONE_S
        with suppress(RuntimeError):  # rank 0 has left, so all ranks have been here
            rendezvous.store.add("gone", 1)
            while rendezvous.store.add("gone", 0) < rendezvous.world_size and time.monotonic() < deadline:
                time.sleep(0.1)

    def _record_verdict(self, reason: str, code: int) -> None:
        """Called by the watchdog on one surviving rank, before it ends the run."""
        if code == self._preemption.get("exit_code", 1):
            self.status.update(now=True, state="preempted", reason=reason)
        else:
            self.status.fail(reason)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        """Notes the signal; the run stops at the start of a step. Before the first step it exits: nothing to save."""
        name = signal.Signals(number).name
        self.asked_to_stop = name
        if self.can_save or self.status["state"] not in ("starting", "preflight"):
            return
        code = self._preemption["exit_code"]
        reason = f"{name} before the first step: nothing to save; the same command starts it again"
        print(f"tied-lora: rank {os.environ['RANK']}: {reason}", file=sys.stderr, flush=True)
        if self.watchdog is not None:
            self.watchdog.fail(reason, code)
        self.status.update(now=True, state="preempted", reason=reason)
        os._exit(code)


def _is_of_network(error: BaseException) -> bool:
    """Whether another rank's death may have caused the error. torch raises plain RuntimeErrors for most of these."""
    import torch

    marks = ("gloo", "nccl", "connection", "socket", "timed out", "timeout", "peer")
    known = isinstance(error, (RuntimeError, torch.distributed.DistError))
    return known and any(mark in str(error).lower() for mark in marks)
