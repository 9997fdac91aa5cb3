# SPDX-License-Identifier: Apache-2.0
"""The whole command on the private SLURM: a run on two nodes is disturbed eight times, in eight ways, and resumes each time.

A start takes longer than all steps, so one run tests every claim. It saves new checkpoints between two disturbances.
Damage by one of them would be in all later checkpoints, and the run must end like the undisturbed one, bit for bit.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.harness.paths import ROOT
from tests.slurm.gates import PLANT, Gate
from tests.slurm.private_cluster import PrivateCluster
from tests.slurm.real_runs import PP2, STEPS, TIMEOUT_S, Run, launch

pytestmark = pytest.mark.timeout(3600)  # nine starts; on a busy machine each takes more than a minute
NAME = "disturbed"
WAIT_S = 300
# Gate to disturbance. Every second step saves a checkpoint, so a run that is killed at a gate resumes from the step before it.
DISTURBANCES = {
    3: "scontrol requeue",
    7: "SIGSTOP to a rank",
    11: "SIGKILL to a rank",
    15: "a node is killed",
    19: "scancel",
    "save-22": "scancel, then SIGKILL during a save",
    23: "the time limit is near",
    27: "SIGUSR1 to one rank",
}


class DisturbedRun:
    """The run, and a record of each of its starts."""

    def __init__(self, slurm: PrivateCluster, workshop: Path, plant: Path) -> None:
        self.slurm, self.plant = slurm, plant
        self.gates = {name: Gate(plant / "gates", name) for name in DISTURBANCES}
        self.variables = {"PYTHONPATH": str(plant), "GATES": str(plant / "gates")}
        job = launch(slurm, workshop, NAME, *PP2, "rank=4", "preset=tl6", **self.variables)
        self.run = Run(slurm, workshop / "runs" / NAME, job)
        self.jobs = [job]
        self.resumed_from: list[int] = []
        self.processes: dict[Any, int] = {}
        self.status_output = ""

    def at(self, name: int | str, *ranks: int) -> Gate:
        """Waits until the ranks have reached a gate, and records the start."""
        gate = self.gates[name]

        def reached() -> bool:
            state = self.slurm.fields(self.run.job)["JobState"]
            assert state in ("PENDING", "RUNNING", "COMPLETING"), f"{name}: {state}\n{self.run.script_log()}"
            return gate.reached_by(*ranks)

        self.slurm.wait_until(reached, WAIT_S, f"the gate {name}")
        self.resumed_from.append(self.run.status["saved_before"])
        self.processes[name] = gate.process(ranks[-1])
        return gate

    def open_after_request(self, gate: Gate, *ranks: int) -> None:
        """Waits until the ranks have received the request to stop, then opens the gate."""
        self.slurm.wait_until(lambda: gate.asked(*ranks), WAIT_S, "the signal")
        gate.open()

    def wait_for_end(self, *states: str) -> None:
        self.slurm.wait_for_state(self.run.job, *states, seconds=WAIT_S)

    def submit_again(self) -> None:
        """Submits the script in the run's folder, as a user does."""
        script = f"runs/{NAME}/job.sbatch"
        workshop = self.run.folder.parents[1]
        self.run.job = self.slurm.run("sbatch", "--parsable", script, cwd=workshop, **self.shell)
        self.jobs.append(self.run.job)

    @property
    def shell(self) -> dict[str, str]:
        root = str(ROOT)
        return {**self.variables, "PYTHONPATH": f"{root}{os.pathsep}{self.plant}"}

    def disturb(self) -> None:
        """Disturbs the run at each gate, and waits for its end."""
        gate = self.at(3, 0, 1)
        self.status_output = self.run.status_output()
        self.slurm.run("scontrol", "requeue", self.run.job)
        self.open_after_request(gate, 0, 1)

        gate = self.at(7, 0, 1)
        os.kill(gate.process(1), signal.SIGSTOP)
        gate.open()

        gate = self.at(11, 0, 1)
        os.kill(gate.process(1), signal.SIGKILL)
        gate.open()

        gate = self.at(15, 0, 1)
        self.slurm.kill_node("n2")
        self.slurm.run("scontrol", "update", "nodename=n2", "state=down", "reason=killed")
        gate.open()
        self.slurm.start_node("n2")

        gate = self.at(19, 0, 1)
        self.slurm.run("scancel", self.run.job)
        self.open_after_request(gate, 0, 1)
        self.wait_for_end("CANCELLED")
        self.submit_again()

        gate = self.at("save-22", 0)
        self.slurm.run("scancel", self.run.job)
        self.slurm.wait_until(lambda: gate.asked(0), WAIT_S, "the signal")
        os.kill(gate.process(0), signal.SIGKILL)  # as SLURM does after KillWait
        gate.open()
        self.wait_for_end("CANCELLED")
        self.submit_again()

        gate = self.at(23, 0, 1)
        self._limit(lambda elapsed: (elapsed + 50) // 60 + 1)
        self.slurm.wait_until(lambda: gate.asked(0, 1), WAIT_S, "the signal before the time limit")
        self._limit(lambda elapsed: 10)
        gate.open()

        gate = self.at(27, 0, 1)
        os.kill(gate.process(1), signal.SIGUSR1)
        self.open_after_request(gate, 1)
        self.run.finish()

    def logs(self, job: int) -> str:
        """Returns the logs of one job's ranks, from all its starts and nodes."""
        found = sorted((self.run.folder / "logs").glob(f"{self.jobs[job]}-*/node-*.log"))
        return "\n".join(path.read_text() for path in found)

    def _limit(self, minutes: Callable[[int], int]) -> None:
        """Sets the job's time limit. `minutes` computes it from the seconds since the job's start."""
        hours, mins, seconds = self.slurm.fields(self.run.job)["RunTime"].split(":")
        limit = minutes(int(hours) * 3600 + int(mins) * 60 + int(seconds))
        self.slurm.run("scontrol", "update", f"jobid={self.run.job}", f"timelimit={limit}")


@pytest.fixture(scope="module")
def disturbed(
    slurm: PrivateCluster, workshop: Path, submitted: dict[str, Run], tmp_path_factory: pytest.TempPathFactory
) -> DisturbedRun:
    """The run, after all disturbances and its end."""
    plant = tmp_path_factory.mktemp("plant")
    (plant / "sitecustomize.py").write_text(PLANT)
    run = DisturbedRun(slurm, workshop, plant)
    run.disturb()
    return run


def test_the_disturbed_run_matches_the_undisturbed_one_bit_for_bit(disturbed: DisturbedRun, undisturbed: Run) -> None:
    run = disturbed.run
    assert [step["step"] for step in run.curves] == list(range(1, STEPS + 1))
    assert run.curves == undisturbed.curves
    assert run.metrics["validations"] == undisturbed.metrics["validations"]
    assert run.adapter.keys() == undisturbed.adapter.keys()
    assert all(torch.equal(run.adapter[name], tensor) for name, tensor in undisturbed.adapter.items())
    for file in sorted(undisturbed.last_checkpoint.glob("*.safetensors")):  # Adam's moments, each rank's generators
        assert (run.last_checkpoint / file.name).read_bytes() == file.read_bytes(), file.name


def test_each_start_resumes_from_the_last_checkpoint_and_a_signal_saves_one_at_once(disturbed: DisturbedRun) -> None:
    at_least, below = [0, 3, 6, 10, 14, 19, 20, 23], [3, 7, 11, 15, 19, 22, 23, 27]
    assert all(low <= step < high for low, step, high in zip(at_least, disturbed.resumed_from, below, strict=True)), (
        disturbed.resumed_from
    )
    status = disturbed.run.status
    assert (status["state"], status["saved_before"]) == ("finished", 27)
    assert status["restarts"] >= len(DISTURBANCES)
    for job, step in ((0, 3), (0, 19), (2, 23), (2, 27)):
        assert f"asked to stop: saved after step {step} of {STEPS}" in disturbed.logs(job), (job, step)


def test_a_stopped_rank_ends_the_run_with_an_error_that_names_it(disturbed: DisturbedRun) -> None:
    named = f"rank 1 (node n2, process {disturbed.processes[7]}): no sign of life for {TIMEOUT_S} s"
    assert f"0: tied-lora: rank 0: the run ends: {named}" in disturbed.logs(0)
    assert "exit code 70: requeued to resume" in disturbed.run.script_log(disturbed.jobs[0])


def test_the_script_requeues_a_run_that_can_resume_unless_slurm_or_a_user_ended_it(disturbed: DisturbedRun) -> None:
    logs = [disturbed.run.script_log(job).splitlines() for job in disturbed.jobs]
    assert sum("requeued to resume" in line for line in logs[0]) >= 2  # the stopped rank and the killed rank
    assert sum("ended from outside" in line for line in logs[0]) >= 2  # scontrol requeue, and scancel
    assert [[line for line in lines if line.endswith(": finished")] for lines in logs[:2]] == [[], []]
    assert sum("exit code 75: requeued to resume" in line for line in logs[2]) >= 2  # the time limit, and SIGUSR1
    assert logs[2][-1].endswith(": finished")


def test_the_status_command_shows_the_run_while_it_trains(disturbed: DisturbedRun) -> None:
    rows = dict(
        line.split(maxsplit=1)
        for line in disturbed.status_output.splitlines()
        if not line.startswith(("rank 0", "last"))
    )
    assert rows["state"] == "training"
    assert rows["step"] == f"3 of {STEPS}"
    assert float(rows["loss"]) > 0
    assert "rank 0            node n1, process" in disturbed.status_output
    assert "-step=2-" in disturbed.status_output
    assert "no sign of life" not in disturbed.status_output


def test_no_half_written_checkpoint_is_left(disturbed: DisturbedRun) -> None:
    folder = disturbed.run.folder / "checkpoints"
    assert not [path.name for path in folder.iterdir() if path.name.startswith(".") or "unfinished" in path.name]
