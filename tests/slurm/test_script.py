# SPDX-License-Identifier: Apache-2.0
"""The whole script on a real SLURM, with ranks that only print their environment and arguments. Tests what the script decides.

A shell script replaces Python, so that a start takes a second.
"""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from nemo_tied_lora.launching.cluster_config import Cluster
from nemo_tied_lora.launching.slurm_script import Job, render
from nemo_tied_lora.launching.sweep import Point, index_file, points
from tests.harness.paths import ROOT
from tests.slurm.private_cluster import PrivateCluster

# The configuration's defaults, without what this machine lacks: GPUs, and exclusive nodes.
BARE = {"kind": "slurm", "memory": "0", "time": "10", "save_seconds": 60, "max_requeues": 1, "at_once": 2}
PRINT = 'env | grep -E "^(RANK|WORLD_SIZE|LOCAL_RANK|NODE_RANK|MASTER_|OMP_|NCCL_|HF_TOKEN)" | sort; echo "got $*"'

Write = Callable[..., Path]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    """A function that writes a job's script and returns its path. The job's "Python" records its call and then runs `body`."""

    def write_job(
        body: str,
        *,
        first: str = "exit 0",
        nodes: int = 2,
        ranks: int = 1,
        runs: list[Point] | None = None,
        script_file: str | None = None,
        **settings: object,
    ) -> Path:
        python = tmp_path / "python"
        program = (
            f'case $2 in *.record | --check) {first} ;; esac\n{{ {PRINT}; }} >> "{tmp_path}/rank-$RANK"\n{body}\n'
        )
        python.write_text(f"#!/usr/bin/env bash\n{program}")
        python.chmod(0o755)
        cluster = Cluster.from_mapping({**BARE, "python": str(python), **settings})
        job = Job(
            name="recorded",
            folder=str(tmp_path / "run"),
            arguments=["name=a b", "model.x='$HOME'"],
            cluster=cluster,
            nodes=nodes,
            ranks_per_node=ranks,
            num_runs=None if runs is None else len(runs),
            script=script_file,
        )
        script = tmp_path / "job.sbatch"
        script.write_text(render(job))
        (tmp_path / "run" / "logs").mkdir(parents=True)
        if job.index is not None:
            Path(job.index).write_text(index_file(job.folder, runs or ()))
        return script

    return write_job


def submit(slurm: PrivateCluster, script: Path, *arguments: str, **variables: str) -> str:
    return slurm.run("sbatch", "--parsable", *arguments, str(script), cwd=script.parent, **variables)


def script_log(script: Path, job: str) -> str:
    return (script.parent / "run" / "logs" / f"{job}.log").read_text()


def test_every_rank_gets_its_rank_numbers_the_address_and_the_settings(slurm: PrivateCluster, write: Write) -> None:
    script = write("exit 0", ranks=2, environment={"NCCL_DEBUG": "WARN", "NCCL_IB_HCA": None})
    job = submit(slurm, script, HF_TOKEN="from the shell")
    assert slurm.wait_for_state(job)["JobState"] == "COMPLETED", script_log(script, job)
    for rank in range(4):
        text = (script.parent / f"rank-{rank}").read_text()
        found = dict(re.findall(r"^(\w+)=(.*)$", text, flags=re.M))
        assert found.pop("MASTER_PORT").isdigit()
        assert found == {
            "RANK": str(rank),
            "WORLD_SIZE": "4",
            "LOCAL_RANK": str(rank % 2),
            "NODE_RANK": str(rank // 2),
            "MASTER_ADDR": "127.0.0.1",
            "OMP_NUM_THREADS": "1",
            "NCCL_DEBUG": "WARN",
            "HF_TOKEN": "from the shell",
        }
        sizes = "trainer.num_nodes=2 trainer.devices=2"
        run = f"exp_manager.explicit_log_dir={script.parent}/run"
        assert f"got -m nemo_tied_lora.commands.finetune name=a b model.x='$HOME' {sizes} {run}" in text
    logs = script.parent / "run" / "logs" / f"{job}-0"
    assert sorted(path.name for path in logs.iterdir()) == ["job.sbatch", "node-0.log", "node-1.log"]
    assert (logs / "job.sbatch").read_text() == script.read_text()
    assert "from the shell" not in script.read_text()


def test_each_node_has_a_log_in_which_every_line_names_its_rank(slurm: PrivateCluster, write: Write) -> None:
    script = write('echo "I am $RANK"', ranks=2)
    job = submit(slurm, script)
    slurm.wait_for_state(job, "COMPLETED")
    logs = [(script.parent / "run" / "logs" / f"{job}-0" / f"node-{node}.log").read_text() for node in (0, 1)]
    assert [sorted(log.split("\n")[:-1]) for log in logs] == [["0: I am 0", "1: I am 1"], ["2: I am 2", "3: I am 3"]]


def test_if_a_rank_dies_the_others_end_and_the_job_is_requeued_at_most_max_requeues_times(
    slurm: PrivateCluster, write: Write
) -> None:
    script = write("[[ $RANK != 1 ]] || { sleep 2; kill -KILL $$; }; sleep 300")
    job = submit(slurm, script)
    fields = slurm.wait_for_state(job, "FAILED", seconds=60)
    assert fields["Restarts"] == "1"
    log = script_log(script, job)
    assert log.count("starting 2 ranks on 2 nodes") == 2
    assert "requeued to resume from the last checkpoint, at most 1 more times" in log
    assert "after 1 restarts: not requeued again" in log
    assert {path.name for path in (script.parent / "run" / "logs").iterdir()} == {f"{job}.log", f"{job}-0", f"{job}-1"}
    ports = re.findall(r"^MASTER_PORT=(\d+)$", (script.parent / "rank-0").read_text(), flags=re.M)
    assert len(set(ports)) == 2


def test_a_refusal_by_the_first_step_starts_no_rank_and_is_not_tried_again(
    slurm: PrivateCluster, write: Write
) -> None:
    script = write("exit 0", first="echo 'not possible' >&2; exit 2")
    job = submit(slurm, script)
    fields = slurm.wait_for_state(job)
    assert (fields["JobState"], fields["Restarts"], fields["ExitCode"]) == ("FAILED", "0", "2:0")
    assert "refused; not started" in script_log(script, job)
    assert not list(script.parent.glob("rank-*"))


def test_a_refusal_by_the_ranks_is_not_tried_again(slurm: PrivateCluster, write: Write) -> None:
    script = write("exit 2", nodes=1)
    job = submit(slurm, script)
    fields = slurm.wait_for_state(job)
    assert (fields["JobState"], fields["Restarts"], fields["ExitCode"]) == ("FAILED", "0", "2:0")


def test_a_training_script_that_saved_and_stopped_early_is_started_again(slurm: PrivateCluster, write: Write) -> None:
    """As examples/bridge/finetune_tied_lora.py does near the time limit, with exit code 75."""
    script = write(
        # SLURM ends the other ranks as soon as one fails, so rank 1 is done before rank 0 stops.
        "if [[ $RANK == 1 ]]; then touch done; exit 0; fi; until [[ -e done ]]; do sleep 0.1; done; sleep 1; rm done\n"
        "[[ -e stopped ]] || { touch stopped; exit 75; }",
        first='echo "$WORLD_SIZE ranks: $*" >> first_steps; exit 0',
        script_file="train.py",
    )
    job = submit(slurm, script)
    fields = slurm.wait_for_state(job, "COMPLETED", seconds=60)
    assert fields["Restarts"] == "1"
    assert "exit code 75: requeued to resume" in script_log(script, job)
    given = f"--folder {script.parent}/run name=a b model.x='$HOME'"
    logs = script.parent / "run" / "logs"
    expected = [f"2 ranks: train.py --check {logs}/{job}-{start} {given}" for start in (0, 1)]
    assert (script.parent / "first_steps").read_text().splitlines() == expected
    assert (script.parent / "rank-1").read_text().count(f"got train.py {given}") == 2


def test_a_cancelled_job_stays_cancelled(slurm: PrivateCluster, write: Write) -> None:
    script = write("trap 'echo saved; exit 75' TERM; touch ready-$RANK; sleep 300 & wait")
    job = submit(slurm, script)
    slurm.wait_until(lambda: len(list(script.parent.glob("ready-*"))) == 2, 30, "two ranks")
    slurm.run("scancel", job)
    fields = slurm.wait_for_state(job)
    slurm.wait_until(lambda: "ended from outside" in script_log(script, job), 30, "the script's last line")
    assert (fields["JobState"], fields["Restarts"]) == ("CANCELLED", "0")
    assert "saved" in (script.parent / "run" / "logs" / f"{job}-0" / "node-1.log").read_text()


def test_a_finished_run_is_not_run_again_when_its_job_is_requeued(slurm: PrivateCluster, write: Write) -> None:
    script = write("exit 0")
    job = submit(slurm, script)
    slurm.wait_for_state(job, "COMPLETED")
    slurm.run("scontrol", "requeue", job)
    slurm.wait_until(lambda: "nothing is left to do" in script_log(script, job), 300, "the second start")
    assert slurm.wait_for_state(job)["JobState"] == "COMPLETED"
    assert (script.parent / "rank-0").read_text().count("WORLD_SIZE") == 1


def test_a_run_that_slurm_stopped_does_not_count_as_finished(slurm: PrivateCluster, write: Write) -> None:
    """A stopped srun may return 0 even if the ranks failed, and another job in the folder may finish meanwhile."""
    script = write("[[ ! -e ready ]] || exit 0; trap 'exit 0' TERM; touch ready; sleep 300 & wait", nodes=1)
    job = submit(slurm, script)
    slurm.wait_until((script.parent / "ready").exists, 60, "the rank")
    slurm.wait_for_state(submit(slurm, script), "COMPLETED")
    slurm.run("scontrol", "requeue", job)
    slurm.wait_until(lambda: script_log(script, job).count("starting 1 ranks") == 2, 300, "the second start")
    assert slurm.wait_for_state(job)["JobState"] == "COMPLETED", script_log(script, job)
    assert "nothing is left to do" not in script_log(script, job)
    assert (script.parent / "run" / "logs" / f"{job}.finished").exists()


def test_each_task_of_an_array_runs_its_line_of_the_index(slurm: PrivateCluster, write: Write) -> None:
    runs = points([["rank=2", "rank=8", "rank=32"]])
    script = write("exit 0", first="exit 0", nodes=1, runs=runs)
    array = submit(slurm, script)
    for number, run in enumerate(runs):
        assert slurm.wait_for_state(f"{array}_{number}")["JobState"] == "COMPLETED"
        folder = script.parent / "run" / run.name
        assert (folder / "logs" / f"{array}_{number}.finished").exists()
        assert (folder / "logs" / f"{array}_{number}-0" / "node-0.log").exists()
        assert (
            f"{run.overrides[0]} trainer.num_nodes=1 trainer.devices=1 exp_manager.explicit_log_dir={folder}\n"
            in (script.parent / "rank-0").read_text()
        )


def test_the_last_task_of_an_array_requeues_itself_and_not_the_array(slurm: PrivateCluster, write: Write) -> None:
    runs = points([["rank=2", "rank=8"]])
    script = write("[[ $* != *rank=8* ]] || exit 1", nodes=1, runs=runs)
    array = submit(slurm, script)
    states = [slurm.wait_for_state(f"{array}_{number}", "COMPLETED", "FAILED", seconds=60) for number in (1, 0)]
    assert [(state["JobState"], state["Restarts"]) for state in states] == [("FAILED", "1"), ("COMPLETED", "0")]


ADOPT = """
import os
from nemo_tied_lora.launching.task_ranks import adopt
adopt()
print(*(os.environ.get(name, "-") for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "NODE_RANK", "MASTER_ADDR", "MASTER_PORT")))
"""


def test_a_plain_srun_makes_each_task_a_rank_and_a_shell_or_a_script_stays_alone(
    slurm: PrivateCluster, tmp_path: Path
) -> None:
    program = tmp_path / "adopt.py"
    program.write_text(ADOPT)
    command, path = (sys.executable, str(program)), str(ROOT)
    sizes = ("--nodes=2", "--ntasks-per-node=2")
    lines = sorted(slurm.run("srun", *sizes, *command, PYTHONPATH=path).splitlines())
    ports = {line.split()[-1] for line in lines}
    assert len(ports) == 1
    # n1 is not the name of a host: the address comes from scontrol.
    assert [line.rsplit(maxsplit=1)[0] for line in lines] == [f"{r} 4 {r % 2} {r // 2} 127.0.0.1" for r in range(4)]
    alone = ["- - - - - -"]
    assert slurm.run("salloc", *sizes, *command, PYTHONPATH=path).splitlines()[:1] == alone
    assert slurm.run("srun", "--ntasks=1", *command, PYTHONPATH=path).splitlines() == alone
    script = tmp_path / "batch.sh"
    script.write_text(f"#!/bin/bash\n{shlex.join(command)}\nsrun {shlex.join(command)}\n")
    job = slurm.run("sbatch", "--parsable", *sizes, f"--output={tmp_path}/log", str(script), PYTHONPATH=path)
    slurm.wait_for_state(job, "COMPLETED")
    first, *ranks = (tmp_path / "log").read_text().splitlines()
    assert [first] == alone
    assert sorted(line.split()[0] for line in ranks) == ["0", "1", "2", "3"]
    assert {line.split()[-1] for line in ranks} != ports


def test_uneven_nodes_are_refused(slurm: PrivateCluster, write: Write) -> None:
    script = write("exit 0")
    job = submit(slurm, script, "--ntasks=3", "--ntasks-per-node=2")
    assert slurm.wait_for_state(job)["ExitCode"] == "2:0"
    assert "refused: 3 tasks on 2 nodes" in script_log(script, job)


def test_shellcheck_finds_nothing() -> None:
    scripts = sorted([*(ROOT / "launch").rglob("*.s*"), ROOT / ".ci" / "run"])
    assert len(scripts) == 4
    done = subprocess.run(["shellcheck", *map(str, scripts)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout
