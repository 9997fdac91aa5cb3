# SPDX-License-Identifier: Apache-2.0
"""Runs ranks in trouble for tests/resilience/test_ranks_in_trouble.py. All scenarios run at once.

It forks the ranks after torch is imported and before it is used, so that a rank costs milliseconds. It prints each scenario's
exit codes, logs and seconds as JSON.
"""

from __future__ import annotations

import importlib
import json
import math
import os
import random
import signal
import socket
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from nemo_tied_lora.errors import TrainingStopped
from nemo_tied_lora.resilience import default_group, group_check, version_check
from nemo_tied_lora.resilience.dead_rank_watchdog import Watchdog
from nemo_tied_lora.resilience.rank import Rank, run_as_rank
from nemo_tied_lora.resilience.rendezvous import Rendezvous

TIMEOUT_S = 6.0
CONTROL_S = 30.0
APART_S = 0.8
"""Seconds between the starts of scenarios. A start takes two cores for half a second; ranks wait TIMEOUT_S for each other."""


def values(folder: Path, world_size: int, **changes: Any) -> dict[str, Any]:
    """Returns a configuration with the keys that `run_as_rank` reads."""
    return {
        "preflight": False,
        "watchdog": {"start_s": 20, "timeout_s": TIMEOUT_S, "stuck_s": 0},
        "preemption": {"exit_code": 75, "max_restarts": 3},
        "exp_manager": {"explicit_log_dir": str(folder)},
        "trainer": {"devices": world_size, "num_nodes": 1, "max_steps": 100, "accelerator": "cpu"},
        "model": {"tensor_model_parallel_size": 2},
        **changes,
    }


def steps(rank: Rank, forever: bool = True) -> dict[str, Any]:
    """A training loop that sums over all ranks in each step."""
    rank.status.update(state="training")
    count = 0
    while forever or count < 20:
        dist.all_reduce(torch.ones(1))
        count += 1
        Path(f"{os.environ['FOLDER']}/step-{os.environ['RANK']}").touch()
        if rank.watchdog is not None:
            rank.watchdog.moved(f"step {count}")
        time.sleep(0.05)
    (Path(os.environ["FOLDER"]) / "metrics.json").touch()
    output = Path(os.environ["FOLDER"]) / "adapter.nemo"
    output.touch()
    return {"output": str(output)}


def train(problems: list[str] | None = None, **changes: Any) -> int:
    """Runs `steps` like `tied-lora finetune`."""
    cfg = values(Path(os.environ["FOLDER"]), int(os.environ["WORLD_SIZE"]), **changes)
    return run_as_rank("finetune", cfg, problems or [], steps)


def only_on(rank: int) -> bool:
    return os.environ["RANK"] == str(rank)


def replace(module: Any, name: str, value: Any) -> None:
    """Plants a fault in this rank's process."""
    setattr(module, name, value)


def hang_in_own_code() -> int:
    """Rank 1 hangs in its own code, and the other waits for it."""
    cfg = values(Path(os.environ["FOLDER"]), 2, watchdog={"start_s": 20, "timeout_s": TIMEOUT_S, "stuck_s": 5})

    def work(rank: Rank) -> dict[str, Any]:
        assert rank.watchdog is not None
        for step in range(1000):
            rank.watchdog.moved(f"step {step}")
            if step == 5 and only_on(1):
                read_the_next_batch()
            dist.all_reduce(torch.ones(1))
        return {}

    original = default_group.make_default_group
    # The watchdog must end it, not the collective's own limit.
    replace(default_group, "make_default_group", lambda values, rendezvous, seconds: original(values, rendezvous, 60))
    return run_as_rank("finetune", cfg, [], work)


def read_the_next_batch() -> None:
    time.sleep(600)


def raise_an_error() -> int:
    cfg = values(Path(os.environ["FOLDER"]), 2)

    def work(rank: Rank) -> Any:
        if only_on(1):
            time.sleep(1)
            raise BaseException("the data has a hole")  # torch's CheckpointException is no Exception either
        return steps(rank)

    return run_as_rank("finetune", cfg, [], work)


def stopped_by_a_guard() -> int:
    """Every rank raises the same `TrainingStopped`, as a guard does."""

    def work(rank: Rank) -> Any:
        dist.all_reduce(torch.ones(1))
        raise TrainingStopped("tie guard: linear_qkv.A differs")

    return run_as_rank("finetune", values(Path(os.environ["FOLDER"]), 2), [], work)


def another_version() -> int:
    if only_on(2):
        os.environ["SLURMD_NODENAME"] = "n2"
        replace(version_check, "installed_version", lambda name: "0.0.1" if name == "torch" else "1")
    else:
        replace(version_check, "installed_version", lambda name: "1")
    return train(preflight=True)


def other_code() -> int:
    if only_on(2):
        os.environ["SLURMD_NODENAME"] = "n2"
        replace(version_check, "_code_hash", lambda folder: "edited")
    return train(preflight=True)


def wrong_sum() -> int:
    honest = group_check.contribution
    if only_on(1):
        os.environ["SLURMD_NODENAME"] = "n2"

        def corrupted(*args: Any) -> torch.Tensor:
            result = honest(*args)
            result[77] += 1
            return result

        replace(group_check, "contribution", corrupted)
    return train(preflight=True, model={"tensor_model_parallel_size": 2, "pipeline_model_parallel_size": 2})


def silent_all_reduce() -> int:
    if only_on(1):
        replace(group_check, "_all_reduce", lambda *args: time.sleep(600))
    return train(preflight=True)


def clean_preflight() -> int:
    return train(preflight="only", model={"tensor_model_parallel_size": 2, "pipeline_model_parallel_size": 1})


def finished() -> int:
    cfg = values(Path(os.environ["FOLDER"]), 2)
    code = run_as_rank("finetune", cfg, [], lambda rank: steps(rank, forever=False))
    os.environ["MASTER_PORT"] = str(int(os.environ["MASTER_PORT"]) + 1)
    again = run_as_rank("finetune", cfg, [], lambda rank: sys.exit("it ran a second time"))
    return code or again


def one_after_another() -> int:
    """Rank 0 is slow, and fails the second time. Its log has who came when."""
    came = Path(os.environ["FOLDER"]) / "came"

    def work(rank: Rank) -> Any:
        for topic in ("tensors", "words"):
            with suppress(OSError), rank.rank_0_first(topic):
                time.sleep(0.5 if only_on(0) else 0)
                with came.open("a") as file:
                    file.write(os.environ["RANK"])
                if topic == "words" and only_on(0):
                    raise OSError
            dist.all_reduce(torch.ones(1))
        if only_on(0):
            print(came.read_text())

    return run_as_rank("finetune", values(came.parent, 2), [], work)


def to(rank: int, number: int) -> Callable[[list[int], Path], None]:
    """Sends a signal to a rank after all ranks have made a step."""

    def send(pids: list[int], folder: Path) -> None:
        if all((folder / f"step-{r}").exists() for r in range(len(pids))):
            os.kill(pids[rank], number)
            raise StopIteration

    return send


def nothing(pids: list[int], folder: Path) -> None:
    raise StopIteration


def problem_on_one() -> int:
    return train(["train.jsonl: no such file"] if only_on(1) else [], preflight=True)


def without(owner: Any, name: str, instead: Callable[..., Any], entry: Callable[[], int]) -> Callable[[], int]:
    """Returns the scenario with one guard switched off."""

    def run() -> int:
        replace(owner, name, instead)
        return entry()

    return run


def look_away(watchdog: Watchdog, *args: Any) -> None: ...


def keep_to_oneself(rendezvous: Rendezvous, problems: list[str], topic: str = "problems") -> list[str]:
    return list(problems)


SCENARIOS: dict[str, tuple[int, Callable[[], int], Callable[[list[int], Path], None]]] = {
    "killed": (3, train, to(2, signal.SIGKILL)),
    "killed_rank_0": (2, train, to(0, signal.SIGKILL)),
    "stopped": (3, train, to(1, signal.SIGSTOP)),
    "stopped_rank_0": (2, train, to(0, signal.SIGSTOP)),
    "standing_still": (2, hang_in_own_code, nothing),
    "error": (2, raise_an_error, nothing),
    "guard": (2, stopped_by_a_guard, nothing),
    "another_version": (4, another_version, nothing),
    "other_code": (4, other_code, nothing),
    "wrong_sum": (4, wrong_sum, nothing),
    "silent_all_reduce": (2, silent_all_reduce, nothing),
    "clean_preflight": (4, clean_preflight, nothing),
    "problem_on_one": (2, problem_on_one, nothing),
    "rank_missing": (
        2,
        lambda: 0 if only_on(1) else train(watchdog={"start_s": 10, "timeout_s": 5, "stuck_s": 0}),
        nothing,
    ),
    "finished": (2, finished, nothing),
    "one_after_another": (2, one_after_another, nothing),
    # Negative controls: the same scenarios without the guard. They are killed after CONTROL_S.
    "killed, unwatched": (3, without(Watchdog, "_check_heartbeats", look_away, train), to(2, signal.SIGKILL)),
    "stopped, unwatched": (3, without(Watchdog, "_check_heartbeats", look_away, train), to(1, signal.SIGSTOP)),
    "stopped_rank_0, unjudged": (2, without(Watchdog, "_watch_store", look_away, train), to(0, signal.SIGSTOP)),
    "standing_still, unwatched": (2, without(Watchdog, "_check_progress", look_away, hang_in_own_code), nothing),
    "problem_on_one, unshared": (2, without(Rendezvous, "agree", keep_to_oneself, problem_on_one), nothing),
    "wrong_sum, unchecked": (4, without(group_check, "_wrong", lambda *args: None, wrong_sum), nothing),
    "another_version, uncompared": (
        4,
        without(version_check, "differences", lambda answers: [], another_version),
        nothing,
    ),
}


def main(names: list[str]) -> None:
    importlib.import_module("megatron.core.parallel_state")  # once, before ranks are forked
    with tempfile.TemporaryDirectory() as root:
        # Controls run into their time limit, so they start first.
        waiting = sorted(names, key=lambda name: ", " not in name)
        running: dict[str, Scenario] = {}
        started = -math.inf
        over: list[bool] = []
        while waiting or not all(over):
            over = [scenario.done() for scenario in running.values()]
            if waiting and time.monotonic() - started > APART_S:
                name, started = waiting.pop(0), time.monotonic()
                running[name] = Scenario(name, Path(root) / name)
                over.append(False)
            time.sleep(0.1)
        print(json.dumps({name: running[name].result() for name in names}))


class Scenario:
    """A scenario's ranks, and their exit codes and logs."""

    def __init__(self, name: str, folder: Path) -> None:
        self.world_size, entry, self.disturb = SCENARIOS[name]
        self.folder = folder
        folder.mkdir()
        port = free_ports()
        self.started = time.monotonic()
        self.disturbed: float | None = None
        self.codes: dict[int, int] = {}
        self.terminated = False
        self.ended: dict[int, float] = {}
        self.pids = [self.fork(rank, port, entry) for rank in range(self.world_size)]

    def fork(self, rank: int, port: int, entry: Callable[[], int]) -> int:
        pid = os.fork()
        if pid:
            return pid
        log = os.open(self.folder / f"log-{rank}", os.O_CREAT | os.O_WRONLY)
        os.dup2(log, 1)
        os.dup2(log, 2)
        torch.set_num_threads(1)
        os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(self.world_size), "LOCAL_RANK": str(rank)}
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "FOLDER": str(self.folder)}
        os.environ |= {"SLURMD_NODENAME": "n1"}
        code = 99
        try:
            code = entry()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)

    def done(self) -> bool:
        if self.disturbed is None:
            try:
                self.disturb(self.pids, self.folder)
            except StopIteration:
                self.disturbed = time.monotonic()
        for rank, pid in enumerate(self.pids):
            if rank not in self.codes:
                found, status = os.waitpid(pid, os.WNOHANG)
                if found:
                    self.codes[rank], self.ended[rank] = os.waitstatus_to_exitcode(status), time.monotonic()
        left = [pid for rank, pid in enumerate(self.pids) if rank not in self.codes]
        if any(self.codes.values()) and not self.terminated:  # like srun --kill-on-bad-exit
            self.terminated = True
            for pid in left:
                os.kill(pid, signal.SIGTERM)
        stopped = "stopped" in self.folder.name and len(left) == 1
        limit = CONTROL_S if ", " in self.folder.name else 90
        if left and (stopped or time.monotonic() - self.started > limit):
            for pid in left:
                os.kill(pid, signal.SIGKILL)
        return not left

    def result(self) -> dict[str, Any]:
        logs = [(self.folder / f"log-{rank}").read_text() for rank in range(self.world_size)]
        status = self.folder / "status.json"
        return {
            "codes": [self.codes[rank] for rank in range(self.world_size)],
            "logs": logs,
            "seconds": [self.ended[rank] - (self.disturbed or self.started) for rank in range(self.world_size)],
            "status": json.loads(status.read_text()) if status.exists() else None,
        }


def free_ports() -> int:
    """Returns a free port; the next one is free too. Both are below the range of outgoing connections, above SLURM's jobs.

    A port of that range may be taken between this check and its use, because the other tests make many connections.
    """
    for _ in range(100):
        with socket.socket() as first, socket.socket() as second:
            port = random.randrange(29000, 32000)
            try:
                first.bind(("127.0.0.1", port))
                second.bind(("127.0.0.1", port + 1))
            except OSError:
                continue
            return port
    raise RuntimeError("no two ports in a row are free")


if __name__ == "__main__":
    main(sys.argv[1:] or list(SCENARIOS))
