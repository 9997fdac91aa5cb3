# SPDX-License-Identifier: Apache-2.0
"""Our own launcher: exit codes, signals, and no rank that survives. Small processes without torch."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from nemo_tied_lora.launching.local_ranks import exit_code
from tests.harness.paths import ROOT

LAUNCH = "import sys; from nemo_tied_lora.launching.local_ranks import start_ranks; sys.exit(start_ranks('ranks', {argv}, {ranks}))"
RANKS = r"""
import os, signal, sys, time
from nemo_tied_lora.launching import local_ranks
from nemo_tied_lora.planning.rank_variables import another_rank_failed
local_ranks.follow_launcher()
rank, what = int(os.environ["RANK"]), sys.argv[1]
folder = os.path.dirname(__file__)

def told(number, frame):
    open(f"{folder}/told-{rank}-{number}", "w").write(str(another_rank_failed()))
    sys.exit(75)

def after_the_other():
    while not os.path.exists(f"{folder}/ready-0"):
        time.sleep(0.01)

def wait():
    open(f"{folder}/ready-{rank}", "w").write(str(os.getpid()))
    time.sleep(60)

for number in (signal.SIGTERM, signal.SIGUSR1):
    signal.signal(number, told)
signal.signal(signal.SIGINT, lambda number, frame: os._exit(130))
if what.isdigit():  # rank 1 ends with this code, the others wait
    rank == 1 and (after_the_other() or sys.exit(int(what)))
    wait()
if what == "killed":
    rank == 1 and (after_the_other() or os.kill(os.getpid(), signal.SIGKILL))
    wait()
if what == "stubborn":  # rank 0 does not answer SIGTERM
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    rank == 1 and (after_the_other() or sys.exit(3))
    wait()
if what == "variables":
    names = ("WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR")
    found = [os.environ[name] for name in names]
    os.write(1, f"{rank} {' '.join(found)} {os.environ['MASTER_PORT'].isdigit()} {sys.argv[2:]}\n".encode())
if what == "wait":
    wait()
"""


def launch(folder: Path, *argv: str, ranks: int = 2) -> subprocess.Popen[str]:
    (folder / "ranks.py").write_text(RANKS)
    path = os.pathsep.join([str(folder), str(ROOT)])
    code = LAUNCH.format(argv=list(argv), ranks=ranks)
    environment = {**os.environ, "PYTHONPATH": path}
    return subprocess.Popen(
        [sys.executable, "-c", code], env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def wait_for(*files: Path) -> None:
    deadline = time.monotonic() + 30
    while not all(file.exists() and file.read_text() for file in files):
        assert time.monotonic() < deadline, files
        time.sleep(0.02)


def lives(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state != "Z"


@pytest.mark.parametrize("code", [1, 2, 3, 70, 75])
def test_the_exit_code_is_that_of_the_first_rank_that_failed_and_the_others_know_why_they_end(
    code: int, tmp_path: Path
) -> None:
    started = launch(tmp_path, str(code))
    printed, errors = started.communicate(timeout=60)
    assert started.returncode == code  # not that of rank 0, which ends with 75
    assert (printed, errors) == ("", "")
    assert (tmp_path / f"told-0-{int(signal.SIGTERM)}").read_text() == "True"


def test_a_rank_that_a_signal_ended_is_named_last_and_the_code_is_the_shells(tmp_path: Path) -> None:
    started = launch(tmp_path, "killed")
    errors = started.communicate(timeout=60)[1]
    assert started.returncode == 137
    assert errors.startswith("tied-lora: rank 1 (process ")
    assert "was ended by SIGKILL; the machine may be out of memory" in errors
    assert errors.count("\n") == 1
    assert [exit_code(code) for code in (0, 2, -9, -15)] == [0, 2, 137, 143]


def test_a_rank_that_does_not_answer_is_killed_after_the_grace_period(tmp_path: Path) -> None:
    grace = "from nemo_tied_lora.launching import local_ranks; local_ranks._GRACE_S = 0.5"
    (tmp_path / "sitecustomize.py").write_text(grace + "\n")
    started = launch(tmp_path, "stubborn")
    started.communicate(timeout=60)
    assert started.returncode == 3


def test_each_rank_gets_its_variables_and_arguments_and_the_output_is_that_of_the_ranks(tmp_path: Path) -> None:
    started = launch(tmp_path, "variables", "a b", ranks=3)
    printed = started.communicate(timeout=60)[0]
    assert started.returncode == 0
    assert sorted(printed.splitlines()) == [f"{rank} 3 {rank} 3 127.0.0.1 True ['a b']" for rank in range(3)]


@pytest.mark.parametrize(
    ("number", "code"),
    [(signal.SIGTERM, 75), (signal.SIGUSR1, 75), (signal.SIGINT, 130)],
    ids=lambda value: str(value),
)
def test_a_signal_reaches_every_rank(number: signal.Signals, code: int, tmp_path: Path) -> None:
    started = launch(tmp_path, "wait")
    ready = [tmp_path / f"ready-{rank}" for rank in range(2)]
    wait_for(*ready)
    started.send_signal(number)
    errors = started.communicate(timeout=60)[1]
    assert (started.returncode, errors) == (code, "")
    if code == 75:
        assert all((tmp_path / f"told-{rank}-{int(number)}").read_text() == "False" for rank in range(2))


def test_no_rank_survives_a_launcher_that_is_killed(tmp_path: Path) -> None:
    started = launch(tmp_path, "wait")
    ready = [tmp_path / f"ready-{rank}" for rank in range(2)]
    wait_for(*ready)
    pids = [int(file.read_text()) for file in ready]
    started.kill()
    started.communicate(timeout=60)
    deadline = time.monotonic() + 20
    while any(map(lives, pids)):
        assert time.monotonic() < deadline
        time.sleep(0.02)
    assert all((tmp_path / f"told-{rank}-{int(signal.SIGTERM)}").read_text() == "False" for rank in range(2))
