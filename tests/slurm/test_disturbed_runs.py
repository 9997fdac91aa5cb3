# SPDX-License-Identifier: Apache-2.0
"""One real run on two nodes that has a bad night: eight times it is disturbed, each time in another way, and goes on.

A start costs more than all steps, so that one run carries every claim. Between two disturbances it saves checkpoints of
its own: what one of them spoiled would be in all that follows, and in the end the run is the undisturbed one, bit for bit.
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

pytestmark = pytest.mark.timeout(3600)  # nine starts, each a minute and more where the machine is busy
NAME = "disturbed"
WAIT_S = 300
# Checkpoints are made after every second step: a run that is killed at a gate goes on from the step before.
NIGHT = {
    3: "scontrol requeue",
    7: "a rank stands still",
    11: "a rank is killed",
    15: "a node is killed",
    19: "scancel",
    "save-22": "scancel, and SIGKILL while it saves",
    23: "the time limit comes near",
    27: "SIGUSR1 to one rank",
}


class Night:
    """The run, and what is noted of each start before the next disturbance."""

    def __init__(self, slurm: PrivateCluster, workshop: Path, plant: Path) -> None:
        self.slurm, self.plant = slurm, plant
        self.gates = {name: Gate(plant / "gates", name) for name in NIGHT}
        self.variables = {"PYTHONPATH": str(plant), "GATES": str(plant / "gates")}
        job = launch(slurm, workshop, NAME, *PP2, "rank=4", "preset=tl6", **self.variables)
        self.run = Run(slurm, workshop / "runs" / NAME, job)
        self.jobs = [job]
        self.went_on_from: list[int] = []
        self.processes: dict[Any, int] = {}
        self.shown = ""

    def at(self, name: int | str, *ranks: int) -> Gate:
        """Waits until the ranks wait at a gate."""
        gate = self.gates[name]

        def reached() -> bool:
            state = self.slurm.fields(self.run.job)["JobState"]
            assert state in ("PENDING", "RUNNING", "COMPLETING"), f"{name}: {state}\n{self.run.said()}"
            return gate.reached_by(*ranks)

        self.slurm.wait_until(reached, WAIT_S, f"the gate {name}")
        self.went_on_from.append(self.run.status["saved_before"])
        self.processes[name] = gate.process(ranks[-1])
        return gate

    def tell(self, gate: Gate, *ranks: int) -> None:
        """Waits until the ranks know that they are to stop, then lets them go on."""
        self.slurm.wait_until(lambda: gate.asked(*ranks), WAIT_S, "the signal")
        gate.open()

    def ends(self, *states: str) -> None:
        self.slurm.wait_for_state(self.run.job, *states, seconds=WAIT_S)

    def submit_again(self) -> None:
        """As a user does: the script that lies in the run's folder."""
        script = f"runs/{NAME}/job.sbatch"
        workshop = self.run.folder.parents[1]
        self.run.job = self.slurm.run("sbatch", "--parsable", script, cwd=workshop, **self.shell)
        self.jobs.append(self.run.job)

    @property
    def shell(self) -> dict[str, str]:
        root = str(ROOT)
        return {**self.variables, "PYTHONPATH": f"{root}{os.pathsep}{self.plant}"}

    def live(self) -> None:
        """From evening to morning."""
        gate = self.at(3, 0, 1)
        self.shown = self.run.shown()
        self.slurm.run("scontrol", "requeue", self.run.job)
        self.tell(gate, 0, 1)

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
        self.tell(gate, 0, 1)
        self.ends("CANCELLED")
        self.submit_again()

        gate = self.at("save-22", 0)
        self.slurm.run("scancel", self.run.job)
        self.slurm.wait_until(lambda: gate.asked(0), WAIT_S, "the signal")
        os.kill(gate.process(0), signal.SIGKILL)  # as SLURM does when KillWait is over
        gate.open()
        self.ends("CANCELLED")
        self.submit_again()

        gate = self.at(23, 0, 1)
        self._limit(lambda elapsed: (elapsed + 50) // 60 + 1)
        self.slurm.wait_until(lambda: gate.asked(0, 1), WAIT_S, "the signal before the time limit")
        self._limit(lambda elapsed: 10)
        gate.open()

        gate = self.at(27, 0, 1)
        os.kill(gate.process(1), signal.SIGUSR1)
        self.tell(gate, 1)
        self.run.finish()

    def logs(self, job: int) -> str:
        """What the ranks said in one of the jobs, all its starts and nodes."""
        found = sorted((self.run.folder / "logs").glob(f"{self.jobs[job]}-*/node-*.log"))
        return "\n".join(path.read_text() for path in found)

    def _limit(self, minutes: Callable[[int], int]) -> None:
        """Changes the job's time limit, in minutes from its start."""
        hours, mins, seconds = self.slurm.fields(self.run.job)["RunTime"].split(":")
        limit = minutes(int(hours) * 3600 + int(mins) * 60 + int(seconds))
        self.slurm.run("scontrol", "update", f"jobid={self.run.job}", f"timelimit={limit}")


@pytest.fixture(scope="module")
def night(
    slurm: PrivateCluster, workshop: Path, submitted: dict[str, Run], tmp_path_factory: pytest.TempPathFactory
) -> Night:
    """The run, at its end, after all that."""
    plant = tmp_path_factory.mktemp("plant")
    (plant / "sitecustomize.py").write_text(PLANT)
    story = Night(slurm, workshop, plant)
    story.live()
    return story


def test_after_every_disturbance_the_run_is_the_undisturbed_one_bit_for_bit(night: Night, undisturbed: Run) -> None:
    run = night.run
    assert [step["step"] for step in run.curves] == list(range(1, STEPS + 1))
    assert run.curves == undisturbed.curves
    assert run.metrics["validations"] == undisturbed.metrics["validations"]
    assert run.adapter.keys() == undisturbed.adapter.keys()
    assert all(torch.equal(run.adapter[name], tensor) for name, tensor in undisturbed.adapter.items())
    for file in sorted(undisturbed.last_checkpoint.glob("*.safetensors")):  # Adam's moments, each rank's generators
        assert (run.last_checkpoint / file.name).read_bytes() == file.read_bytes(), file.name


def test_each_start_goes_on_from_the_last_checkpoint_and_a_signal_leaves_one_of_the_very_step(night: Night) -> None:
    at_least, below = [0, 3, 6, 10, 14, 19, 20, 23], [3, 7, 11, 15, 19, 22, 23, 27]
    assert all(low <= step < high for low, step, high in zip(at_least, night.went_on_from, below, strict=True)), (
        night.went_on_from
    )
    status = night.run.status
    assert (status["state"], status["saved_before"]) == ("finished", 27)
    assert status["restarts"] >= len(NIGHT)
    for job, step in ((0, 3), (0, 19), (2, 23), (2, 27)):
        assert f"asked to stop: saved after step {step} of {STEPS}" in night.logs(job), (job, step)


def test_a_rank_that_stands_still_becomes_an_error_that_names_it(night: Night) -> None:
    named = f"rank 1 (node n2, process {night.processes[7]}): no sign of life for {TIMEOUT_S} s"
    assert f"0: tied-lora: rank 0: the run ends: {named}" in night.logs(0)
    assert "exit code 70: requeued to resume" in night.run.said(night.jobs[0])


def test_the_script_requeues_what_can_go_on_and_leaves_what_slurm_or_a_person_ended(night: Night) -> None:
    said = [night.run.said(job).splitlines() for job in night.jobs]
    assert sum("requeued to resume" in line for line in said[0]) >= 2  # the standstill and the killed rank
    assert sum("ended from outside" in line for line in said[0]) >= 2  # scontrol's requeue, and at the end scancel
    assert [[line for line in lines if line.endswith(": finished")] for lines in said[:2]] == [[], []]
    assert sum("exit code 75: requeued to resume" in line for line in said[2]) >= 2  # the time limit, and SIGUSR1
    assert said[2][-1].endswith(": finished")


def test_the_run_is_seen_from_outside_while_it_goes(night: Night) -> None:
    rows = dict(line.split(maxsplit=1) for line in night.shown.splitlines() if not line.startswith(("rank 0", "last")))
    assert rows["state"] == "training"
    assert rows["step"] == f"3 of {STEPS}"
    assert float(rows["loss"]) > 0
    assert "rank 0            node n1, process" in night.shown
    assert "-step=2-" in night.shown
    assert "no sign of life" not in night.shown


def test_nothing_that_was_half_written_is_left(night: Night) -> None:
    folder = night.run.folder / "checkpoints"
    assert not [path.name for path in folder.iterdir() if path.name.startswith(".") or "unfinished" in path.name]
