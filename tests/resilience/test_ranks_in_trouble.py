# SPDX-License-Identifier: Apache-2.0
"""Several ranks: if one dies, hangs, disagrees or never starts, all end in time, with an error that names it.

Real processes over gloo, without NeMo. All scenarios of rank_scenarios.py run at once.
"""

from __future__ import annotations

import json
import os
import re
import socket
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest

from nemo_tied_lora.errors import ConfigError
from nemo_tied_lora.planning.rank_variables import STORE_SOCKET
from nemo_tied_lora.resilience.dead_rank_watchdog import EXIT_CODE
from nemo_tied_lora.resilience.rank import STOPPED
from nemo_tied_lora.resilience.rendezvous import connect
from tests.harness.paths import ROOT
from tests.resilience.rank_scenarios import SCENARIOS, TIMEOUT_S, free_ports

# The watchdog's limit, two heartbeats, and some time for a loaded machine.
IN_TIME_S = TIMEOUT_S + 20


@pytest.fixture(scope="module")
def ends() -> dict[str, Any]:
    command = [sys.executable, "-W", "ignore", "-m", "tests.resilience.rank_scenarios"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout)
    assert found.keys() == SCENARIOS.keys()
    return found


def check_gone(end: dict[str, Any], gone: int) -> None:
    """The other ranks end in time, with an error that names the dead one."""
    others = [rank for rank in range(len(end["codes"])) if rank != gone]
    assert [end["codes"][rank] for rank in others] == [EXIT_CODE] * len(others), end["logs"]
    assert max(end["seconds"][rank] for rank in others) < IN_TIME_S
    for rank in others:
        assert f"rank {rank}: the run ends: rank {gone}" in end["logs"][rank]
    assert end["status"]["state"] == "failed"
    assert f"rank {gone}" in end["status"]["reason"]


@pytest.mark.parametrize(
    ("name", "gone"), [("killed", 2), ("killed_rank_0", 0), ("stopped", 1), ("stopped_rank_0", 0)]
)
def test_the_others_end_in_time_and_name_the_dead_rank(ends: dict[str, Any], name: str, gone: int) -> None:
    check_gone(ends[name], gone)


def check_standing_still(end: dict[str, Any]) -> None:
    """The rank that hangs is named, and the other is not."""
    assert end["codes"] == [EXIT_CODE, EXIT_CODE]
    assert "not waiting for others: rank 1 (node n1" in end["logs"][0]
    assert "read_the_next_batch" in end["logs"][0]
    assert "rank 0 (node" not in end["logs"][0]


def test_a_rank_that_hangs_is_named_with_its_current_line(ends: dict[str, Any]) -> None:
    check_standing_still(ends["standing_still"])


def test_a_ranks_error_ends_the_others_at_once(ends: dict[str, Any]) -> None:
    end = ends["error"]
    assert all(code != 0 for code in end["codes"])
    assert "the data has a hole" in end["status"]["reason"]
    for rank, log in enumerate(end["logs"]):
        line = rf"tied-lora: rank {rank}: the run ends: rank 1 on node n1 failed: BaseException: the data has a hole; "
        assert re.fullmatch(line + r"the traceback is in \S+/finetune-rank-1.traceback\n", log)


def test_a_guard_that_stops_the_run_prints_once_and_every_rank_exits_with_its_code(ends: dict[str, Any]) -> None:
    end = ends["guard"]
    assert end["codes"] == [STOPPED, STOPPED] != [0, 0], end["logs"]
    assert end["logs"][0].count("tied-lora finetune: tie guard: linear_qkv.A differs") == 1
    assert "tie guard" not in end["logs"][1]
    assert end["status"]["state"] == "failed"
    assert end["status"]["reason"] == "tie guard: linear_qkv.A differs"


def check_refusal(end: dict[str, Any], reason: str, living: list[int] | None = None) -> None:
    """Every rank exits with 2. Rank 0 prints the reason once, and no rank prints a traceback."""
    living = list(range(len(end["codes"]))) if living is None else living
    assert [end["codes"][rank] for rank in living] == [2] * len(living), end["logs"]
    assert reason in end["logs"][0], end["logs"]
    assert end["logs"][0].count("not possible") == 1
    assert all("not possible" not in end["logs"][rank] for rank in living[1:])
    assert not any("Traceback" in end["logs"][rank] for rank in living)


def test_a_wrong_sum_is_found_in_every_group_that_the_rank_is_in(ends: dict[str, Any]) -> None:
    log = ends["wrong_sum"]["logs"][0]
    for kind, ranks in (("tensor", [0, 1]), ("pipeline", [1, 3])):
        assert f"all-reduce, {kind} parallel: wrong sum: element 77 is " in log
        assert f"of ranks {ranks}" in log


REFUSALS = {
    "another_version": "torch: 0.0.1 on node n2 (rank 2), 1 on the others",
    "other_code": "nemo_tied_lora's code: edited on node n2 (rank 2)",
    "wrong_sum": "all-reduce, tensor parallel: wrong sum: element 77 is ",
    "silent_all_reduce": "all-reduce, tensor parallel: ",
    "problem_on_one": "train.jsonl: no such file (on node n1 (rank 1))",
}


@pytest.mark.parametrize("name", REFUSALS)
def test_preflight_refuses_on_every_rank_with_one_message_on_rank_0(ends: dict[str, Any], name: str) -> None:
    check_refusal(ends[name], REFUSALS[name], [0] if name == "silent_all_reduce" else None)


CONTROLS: dict[str, Callable[[dict[str, Any]], None]] = {
    "killed, unwatched": partial(check_gone, gone=2),
    "stopped, unwatched": partial(check_gone, gone=1),
    "stopped_rank_0, unjudged": partial(check_gone, gone=0),
    "standing_still, unwatched": check_standing_still,
    "problem_on_one, unshared": partial(check_refusal, reason=REFUSALS["problem_on_one"]),
    "wrong_sum, unchecked": partial(check_refusal, reason=REFUSALS["wrong_sum"]),
    "another_version, uncompared": partial(check_refusal, reason=REFUSALS["another_version"]),
}
"""Maps each scenario without its guard to the check that passes with the guard."""


@pytest.mark.parametrize("name", CONTROLS)
def test_without_the_guard_the_same_check_fails(ends: dict[str, Any], name: str) -> None:
    with pytest.raises(AssertionError):
        CONTROLS[name](ends[name])


def test_a_rank_that_never_starts_is_named(ends: dict[str, Any]) -> None:
    end = ends["rank_missing"]
    assert end["codes"] == [2, 0]
    assert "rank 1 of 2: not started, or did not arrive within 10 s" in end["logs"][0]


def test_a_sound_allocation_passes_and_prints_each_groups_bandwidth(ends: dict[str, Any]) -> None:
    end = ends["clean_preflight"]
    assert end["codes"] == [0, 0, 0, 0], end["logs"]
    printed = end["logs"][0]
    assert "the same software and configuration on all 4 ranks" in printed
    assert "all-reduce, tensor parallel: 2 groups of 2," in printed
    assert "all-reduce, data parallel: 2 groups of 2," in printed
    assert "GB/s at least (ranks [" in printed
    assert "pre-flight: all is well" in printed
    assert end["status"] is None  # no run has started


def test_a_finished_run_is_not_repeated(ends: dict[str, Any]) -> None:
    end = ends["finished"]
    assert end["codes"] == [0, 0], end["logs"]
    assert "finished already" in end["logs"][0]
    assert end["status"]["state"] == "finished"


def test_the_other_ranks_wait_for_rank_0_also_if_it_fails(ends: dict[str, Any]) -> None:
    end = ends["one_after_another"]
    assert (end["codes"], end["logs"]) == ([0, 0], ["0101\n", ""])


def test_a_rank_does_not_join_the_store_of_another_step_with_the_same_port() -> None:
    port = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_ports())}
    held = connect(5, {**port, "RANK": "0", "SLURM_JOB_ID": "76", "SLURM_STEP_ID": "0"})
    assert connect(5, {**port, "RANK": "1", "SLURM_JOB_ID": "76", "SLURM_STEP_ID": "0"})
    with pytest.raises(ConfigError, match=r"SLURM step 76\.0 uses it, not 77\.0; set MASTER_PORT to a free port"):
        connect(5, {**port, "RANK": "1", "SLURM_JOB_ID": "77", "SLURM_STEP_ID": "0"})
    assert held


def test_rank_0_takes_the_socket_that_its_launcher_has_opened() -> None:
    """The launcher closes its own copy, so that ranks cannot connect to a store whose rank has died."""
    with socket.create_server(("127.0.0.1", 0)) as listening:
        place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(listening.getsockname()[1])}
        held = connect(5, {**place, "RANK": "0", STORE_SOCKET: str(os.dup(listening.fileno()))})
    held.set("key", "value")
    assert connect(5, {**place, "RANK": "1"}).get("key") == b"value"
