# SPDX-License-Identifier: Apache-2.0
"""One rank's run, from meeting the others to its exit code: all ranks refuse, stop and finish together."""

from __future__ import annotations

import dataclasses
import datetime
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable, Mapping
from contextlib import nullcontext, suppress
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

from nemo_tied_lora.errors import ConfigError, TrainingStopped, report
from nemo_tied_lora.planning.parallel_layout import Layout
from nemo_tied_lora.planning.run_settings import run_folder
from nemo_tied_lora.resilience.current_run import RankRun, current_run, set_current_run
from nemo_tied_lora.resilience.restarts import Preempted, fingerprint, finished_before, restarted
from nemo_tied_lora.resilience.status_file import RunStatus, read_status
from nemo_tied_lora.resilience.stop_signals import answered_by, ignore_from_now

if TYPE_CHECKING:
    from nemo_tied_lora.resilience.rendezvous import Rendezvous

__all__ = ["STOPPED", "finished_already", "preempted_code", "run_as_rank"]

STOPPED = 3
"""The exit code of a run that one of its guards has stopped."""

_START_S = 300.0
_GONE_S = 10.0


def run_as_rank(command: str, values: Mapping[str, Any], problems: list[str], work: Callable[[], Any]) -> int:
    """Meets the other ranks, agrees with them whether to start, and does the work under the watchdog.

    Args:
        values: the composed configuration.
        problems: this rank's own.
        work: returns the summary whose "output" names the file it wrote; may raise ConfigError or Preempted.

    Returns:
        0; 2 where it is refused; `preemption.exit_code` where it was asked to stop and can be continued.
    """
    started = _meet(command, values, problems)
    if isinstance(started, int):
        return started
    rendezvous, run = started
    with answered_by(_on_signal) if "preemption" in values else nullcontext():
        code = _work(command, run, work)
    del rendezvous  # rank 0 holds the store until here
    return code


def finished_already(values: Mapping[str, Any]) -> str | None:
    """What to say where this very run has finished before; a finished run is not done again."""
    if values.get("preflight") == "only" or "preemption" not in values:
        return None
    output = finished_before(run_folder(values), fingerprint(values))
    if output is None:
        return None
    return f"finished already: {output}; for another run, change the settings, name=, or remove {run_folder(values)}"


def preempted_code(values: Mapping[str, Any], code: int) -> int:
    """`code`, or that of a run that can be continued: torchrun has one code for all that is not 0."""
    folder, preemption = run_folder(values), values.get("preemption")
    status = read_status(folder) if folder is not None and preemption else None
    return preemption["exit_code"] if preemption and status and status.get("state") == "preempted" else code


def _meet(command: str, values: Mapping[str, Any], problems: list[str]) -> int | tuple[Rendezvous | None, RankRun]:
    """An exit code, or the run that is about to begin."""
    first, several = os.environ["RANK"] == "0", os.environ["WORLD_SIZE"] != "1"
    rendezvous: Rendezvous | None = None
    try:
        if several:
            from nemo_tied_lora.resilience.rendezvous import Rendezvous

            seconds = float((values.get("watchdog") or {}).get("start_s", _START_S))
            rendezvous = Rendezvous.join(seconds)
            problems = rendezvous.agree(problems)
        if problems:
            raise ConfigError(problems)
        said = finished_already(values) if first else None
        said = rendezvous.broadcast("finished", said) if rendezvous else said
        if said is not None:
            if first:
                print(f"tied-lora {command}: {said}", flush=True)
            if rendezvous:
                _wait_for_all(rendezvous)
            return 0
        run = _begin(values, rendezvous, first=first)
        if values.get("preflight", False):
            run.status.update(state="preflight")
            _preflight(values, rendezvous, first=first)
            if values["preflight"] == "only":
                _leave(run)
                return 0
    except ConfigError as error:
        code = report(command, error) if first or rendezvous is None else 2
        _refuse(error, rendezvous, first=first)
        return code
    return rendezvous, run


def _refuse(error: ConfigError, rendezvous: Rendezvous | None, *, first: bool) -> None:
    """Ends what has begun. With a process group, this process too: a collective that hangs cannot be taken back."""
    ignore_from_now()
    run = current_run()
    if run is not None and first:
        run.status.fail("; ".join(error.problems))
    if run is not None and run.watchdog is not None:
        run.watchdog.stop()
    if rendezvous:
        _wait_for_all(rendezvous)
    if "torch" in sys.modules and sys.modules["torch"].distributed.is_initialized():
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(2)


def _begin(values: Mapping[str, Any], rendezvous: Rendezvous | None, *, first: bool) -> RankRun:
    """The status file, the watchdog and, on several ranks, the process group with the configured time limits."""
    folder, preemption = run_folder(values), values.get("preemption") or {}
    if "preemption" not in values or values["preflight"] == "only":
        folder = None
    counts: dict[str, int] | list[str] = {}
    if first and preemption:
        try:
            counts = restarted(folder, fingerprint(values), preemption["max_restarts"])
        except ConfigError as error:
            counts = list(error.problems)
    counts = rendezvous.broadcast("restarts", counts) if rendezvous else counts
    if isinstance(counts, list):
        raise ConfigError(counts)
    from nemo_tied_lora.resilience.rendezvous import connect, node_name

    facts: dict[str, Any] = {"node": node_name(), "pid": os.getpid(), **counts}
    if folder is not None:
        facts |= {"settings": fingerprint(values), "step": 0, "max_steps": values["trainer"]["max_steps"]}
    status = RunStatus(folder, active=first, **facts)
    status.start()
    watching = values.get("watchdog") or {}
    run = RankRun(status, preemption.get("exit_code", 1), watching.get("stuck_s", 0))
    set_current_run(run)
    if rendezvous and watching.get("timeout_s"):
        from nemo_tied_lora.resilience.dead_rank_watchdog import Watchdog

        store = connect(watching["timeout_s"], client=True)
        run.watchdog = Watchdog(
            store,
            rendezvous.rank,
            rendezvous.world_size,
            timeout_s=watching["timeout_s"],
            stuck_s=watching["stuck_s"],
            on_end=lambda reason, code: _record_end(status, reason, code, run),
        )
        run.watchdog.start()
        _make_process_group(values, rendezvous, watching["stuck_s"] or watching["timeout_s"])
    return run


def _make_process_group(values: Mapping[str, Any], rendezvous: Rendezvous, seconds: float) -> None:
    """Before Lightning does, which then uses it: with the configured time limit, over the ranks' store."""
    import torch
    from torch.distributed import PrefixStore

    from nemo_tied_lora.platform.devices import select_device

    device = select_device(values["trainer"].get("accelerator"))
    limit = datetime.timedelta(seconds=seconds)
    torch.distributed.init_process_group(
        "nccl" if device.type == "cuda" else "gloo",
        store=PrefixStore("process_group", rendezvous.store),
        rank=rendezvous.rank,
        world_size=rendezvous.world_size,
        timeout=limit,
    )


def _preflight(values: Mapping[str, Any], rendezvous: Rendezvous | None, *, first: bool) -> None:
    """The same software everywhere, and every group's all-reduce.

    Raises:
        ConfigError: on every rank, what any rank found.
    """
    lines = []
    if rendezvous:
        from nemo_tied_lora.resilience import version_check

        rendezvous.put("software", version_check.local_report(values))
        found = version_check.differences(rendezvous.gather("software")) if first else []
        found = rendezvous.broadcast("software/all", found)
        if found:
            raise ConfigError(found)
        lines = [f"the same software and configuration on all {rendezvous.world_size} ranks"]
        lines += _check_collectives(values, rendezvous)
    if first:
        print("\n".join([f"pre-flight: {line}" for line in [*lines, "all is well"]]), flush=True)


def _check_collectives(values: Mapping[str, Any], rendezvous: Rendezvous) -> list[str]:
    import torch

    from nemo_tied_lora.platform.devices import collective_device
    from nemo_tied_lora.resilience import group_check

    if not torch.distributed.is_initialized():  # watchdog.timeout_s=0
        _make_process_group(values, rendezvous, rendezvous.timeout_s)
    seconds = values["watchdog"]["timeout_s"] or rendezvous.timeout_s
    rendezvous = dataclasses.replace(rendezvous, timeout_s=float(seconds))
    layout = Layout.from_config(values)
    swapped = bool(values["model"].get("use_tp_pp_dp_mapping"))
    groups = {kind: group_check.group_ranks(layout, kind, pipeline_before_data=swapped) for kind in group_check.GROUPS}
    rendezvous.put(
        "collectives", group_check.local_report(group_check.check_groups(rendezvous, groups, collective_device()))
    )
    lines: list[str] = []
    problems: list[str] = []
    if rendezvous.rank == 0:
        said = rendezvous.gather("collectives")
        nodes = {rank: one["node"] for rank, one in said.items()}
        lines, problems = group_check.report({rank: one["results"] for rank, one in said.items()}, nodes)
        silent = sorted(set(range(rendezvous.world_size)) - said.keys())
        problems += [f"all-reduce: ranks {silent} did not come back from it"] if silent else []
    problems = rendezvous.broadcast("collectives/all", problems)
    if problems:
        raise ConfigError(problems)
    return lines


def _work(command: str, run: RankRun, work: Callable[[], Any]) -> int:
    """The work, and what its end means for the other ranks."""
    try:
        summary = work()
    except Preempted as stop:
        run.status.update(now=True, state="preempted", reason=str(stop))
        if os.environ["RANK"] == "0":
            print(f"tied-lora {command}: {stop}", flush=True)
        _leave(run)
        return run.exit_code
    except (ConfigError, TrainingStopped) as error:
        # Said before the others are met again: a launcher may end this rank as soon as another has gone.
        code = _report_failure(command, error, run)
        _leave(run)
        return code
    except Exception as error:
        traceback.print_exc()
        sys.stderr.flush()
        said = (str(error).strip().splitlines() or [""])[0]
        reason = f"rank {os.environ['RANK']} failed: {type(error).__name__}: {said}"
        _fail(run, reason, of_network=_is_of_network(error))
        return 1
    output = summary.get("output") if isinstance(summary, Mapping) else None
    run.status.update(now=True, state="finished", output=output and str(Path(output).resolve()))
    _leave(run)
    return 0


def _report_failure(command: str, failure: ConfigError | TrainingStopped, run: RankRun) -> int:
    """Rank 0 says it once, for every rank has the same; returns the exit code."""
    first = os.environ["RANK"] == "0"
    if first:
        run.status.fail("; ".join(failure.problems) if isinstance(failure, ConfigError) else str(failure))
    if isinstance(failure, ConfigError):
        return report(command, failure) if first else 2
    if first:
        print(f"tied-lora {command}: {failure}", file=sys.stderr, flush=True)
    return STOPPED


def _fail(run: RankRun, reason: str, *, of_network: bool) -> None:
    if run.watchdog is None:
        run.status.fail(reason)
    elif of_network:
        run.watchdog.fail_after_peers(reason)
    else:
        run.watchdog.fail(reason)


def _is_of_network(error: BaseException) -> bool:
    """Whether it may come of another rank's end: torch raises plain RuntimeErrors for most of them."""
    import torch

    marks = ("gloo", "nccl", "connection", "socket", "timed out", "timeout", "peer")
    known = isinstance(error, (RuntimeError, torch.distributed.DistError))
    return known and any(mark in str(error).lower() for mark in marks)


def _leave(run: RankRun) -> None:
    """All ranks, together: then rank 0, whose store the others use, and the rest may go."""
    import torch

    ignore_from_now()
    if run.watchdog is not None:
        run.watchdog.stop()
    # A rank that exits with its groups' threads running may be aborted, after its work is done.
    if torch.distributed.is_initialized():
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()


def _wait_for_all(rendezvous: Rendezvous) -> None:
    """No rank goes before all have heard; rank 0, which holds the store, goes when all are about to.

    Each is deaf to signals by now: a launcher that ends the others when the first has gone changes no exit code.
    """
    deadline = time.monotonic() + _GONE_S
    with suppress(RuntimeError):  # rank 0 has gone, so that all have heard
        rendezvous.store.add("gone", 1)
        while rendezvous.store.add("gone", 0) < rendezvous.world_size and time.monotonic() < deadline:
            time.sleep(0.1)


def _record_end(status: RunStatus, reason: str, code: int, run: RankRun) -> None:
    if code == run.exit_code:
        status.update(now=True, state="preempted", reason=reason)
    else:
        status.fail(reason)


def _on_signal(number: int, frame: FrameType | None) -> None:
    """Notes the signal for the step's end; before the first step there is nothing to save."""
    run = current_run()
    name = signal.Signals(number).name
    if run is None:
        os._exit(128 + number)
    run.asked_to_stop = name
    if run.can_save or run.status["state"] not in ("starting", "preflight"):
        return
    reason = f"{name} before the first step: nothing to save; the same command starts it again"
    print(f"tied-lora: rank {os.environ['RANK']}: {reason}", file=sys.stderr, flush=True)
    if run.watchdog is not None:
        run.watchdog.fail(reason, run.exit_code)
    run.status.update(now=True, state="preempted", reason=reason)
    os._exit(run.exit_code)
