# SPDX-License-Identifier: Apache-2.0
"""The shell scripts: a SLURM job under each set of variables that sbatch may set. A fake srun notes what it was asked.

tests/slurm runs the script on a real SLURM.
"""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from tests.harness.paths import ROOT

PROGRAMS = {
    "srun": 'echo "srun $*" >> "$NOTES"',
    "scontrol": 'case $* in *hostnames*) printf "n1\\nn2\\n" ;; *) echo "NodeName=n1 ${ADDRESS-NodeAddr=10.0.0.1}" ;; esac',
    "squeue": "echo RUNNING",
}


def run(folder: Path, *arguments: str, script: str = "finetune", **variables: str) -> subprocess.CompletedProcess[str]:
    """Runs launch/slurm/SCRIPT.sbatch as sbatch would, with these variables of SLURM and no others."""
    programs = folder / "bin"
    programs.mkdir()
    for name, body in PROGRAMS.items():
        (programs / name).write_text(f"#!/bin/bash\n{body}\n")
        (programs / name).chmod(0o755)
    clean = {name: value for name, value in os.environ.items() if not name.startswith("SLURM")}
    environment = {**clean, **variables, "PATH": f"{programs}:{os.environ['PATH']}", "NOTES": str(folder / "notes")}
    command = ["bash", str(ROOT / "launch" / "slurm" / f"{script}.sbatch"), *arguments]
    return subprocess.run(
        command, env=environment, cwd=folder, capture_output=True, text=True, check=False, timeout=60
    )


JOB = {"SLURM_JOB_ID": "4242", "SLURM_JOB_NODELIST": "n[1-2]"}

STARTED: dict[str, tuple[dict[str, str], int, int]] = {
    "all of them": (
        {
            "SLURM_NTASKS": "16",
            "SLURM_NTASKS_PER_NODE": "8",
            "SLURM_TASKS_PER_NODE": "8(x2)",
            "SLURM_JOB_NUM_NODES": "2",
        },
        2,
        8,
    ),
    "only --ntasks-per-node": ({"SLURM_NTASKS_PER_NODE": "8", "SLURM_JOB_NUM_NODES": "2"}, 2, 8),
    "only SLURM_TASKS_PER_NODE": ({"SLURM_TASKS_PER_NODE": "8(x2)", "SLURM_JOB_NUM_NODES": "2"}, 2, 8),
    "only --ntasks": ({"SLURM_NTASKS": "4", "SLURM_TASKS_PER_NODE": "2(x2)", "SLURM_JOB_NUM_NODES": "2"}, 2, 2),
    "the old names": ({"SLURM_NPROCS": "4", "SLURM_NNODES": "2"}, 2, 2),
    "the old name of the nodes": ({"SLURM_NPROCS": "4", "SLURM_JOB_NODELIST": "", "SLURM_NODELIST": "n1"}, 1, 4),
    "one node": ({"SLURM_NTASKS": "8", "SLURM_TASKS_PER_NODE": "8", "SLURM_JOB_NUM_NODES": "1"}, 1, 8),
    "one node and the tasks on it": ({"SLURM_TASKS_PER_NODE": "8"}, 1, 8),
    "a job that is its only group": ({"SLURM_NTASKS": "2", "SLURM_JOB_NUM_NODES": "1", "SLURM_HET_SIZE": "1"}, 1, 2),
}


@pytest.mark.parametrize("name", STARTED)
def test_the_script_starts_one_rank_per_task_whatever_variables_say_so(name: str, tmp_path: Path) -> None:
    variables, nodes, each = STARTED[name]
    done = run(tmp_path, **{**JOB, **variables})
    assert done.returncode == 0, done.stdout + done.stderr
    first, ranks = (tmp_path / "notes").read_text().splitlines()[:2]
    assert f"trainer.num_nodes={nodes} trainer.devices={each} " in first
    assert ranks.startswith(f"srun --nodes={nodes} --ntasks={nodes * each} --ntasks-per-node={each} ")
    assert f"starting {nodes * each} ranks on {nodes} nodes" in done.stdout


def test_another_frameworks_script_is_checked_for_all_ranks_and_then_started_on_each(tmp_path: Path) -> None:
    sizes = {"SLURM_NTASKS": "16", "SLURM_TASKS_PER_NODE": "8(x2)", "SLURM_JOB_NUM_NODES": "2"}
    done = run(tmp_path, "peft.rank=16", script="bridge", **JOB, **sizes)
    assert done.returncode == 0, done.stdout + done.stderr
    notes = (tmp_path / "notes").read_text()
    program, folder = "python3 examples/bridge/finetune_tied_lora.py", "runs/tied_lora"
    given = f"--folder {folder} --hf-path=my-base --data=my-data model.tensor_model_parallel_size=8 peft.rank=16\n"
    first = notes.splitlines(keepends=True)[0]
    assert first == (
        f"srun --nodes=1 --ntasks=1 --ntasks-per-node=1 env WORLD_SIZE=16 {program} --check {folder}/logs/4242-0 {given}"
    )
    assert notes.endswith(f"rank {program} {given}")
    assert "trainer." not in notes
    assert (tmp_path / folder / "logs" / "4242.finished").exists()


REFUSED: dict[str, tuple[dict[str, str], str]] = {
    "uneven nodes": (
        {**JOB, "SLURM_NTASKS": "20", "SLURM_TASKS_PER_NODE": "8(x2),4", "SLURM_JOB_NUM_NODES": "3"},
        "refused: 20 tasks on 3 nodes (8(x2),4); ask for the same number on each, with --ntasks-per-node",
    ),
    "uneven nodes, though the number divides": (
        {**JOB, "SLURM_NTASKS": "4", "SLURM_TASKS_PER_NODE": "3,1", "SLURM_JOB_NUM_NODES": "2"},
        "refused: 4 tasks on 2 nodes (3,1); ask for the same number on each",
    ),
    "a number that does not divide": (
        {**JOB, "SLURM_NTASKS": "3", "SLURM_JOB_NUM_NODES": "2"},
        "refused: 3 tasks on 2 nodes; ask for the same number",
    ),
    "no number of tasks": ({**JOB, "SLURM_JOB_NUM_NODES": "2"}, "refused: 0 tasks on 2 nodes; ask for"),
    "a heterogeneous job": (
        {**JOB, "SLURM_NTASKS": "8", "SLURM_JOB_NUM_NODES": "1", "SLURM_HET_SIZE": "2"},
        "refused: a heterogeneous job (SLURM_HET_SIZE=2): all nodes must hold the same number of ranks",
    ),
    "a node whose address scontrol does not know": (
        {**JOB, "SLURM_NTASKS": "2", "SLURM_JOB_NUM_NODES": "2", "ADDRESS": ""},
        "refused: scontrol does not know the address of n1 (SLURM_JOB_NODELIST=n[1-2])",
    ),
    "no SLURM": ({}, "refused: SLURM_JOB_ID is not set: this is a job's script; submit it with sbatch"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_an_allocation_that_cannot_hold_a_run_is_refused_in_one_line_and_starts_nothing(
    name: str, tmp_path: Path
) -> None:
    variables, line = REFUSED[name]
    done = run(tmp_path, **variables)
    assert done.returncode == 2
    assert line in done.stdout
    assert (done.stdout.count("\n"), done.stderr) == (1, "")
    assert not (tmp_path / "notes").exists()


def test_torchrun_on_several_machines_needs_an_address() -> None:
    environment = {name: value for name, value in os.environ.items() if name != "MASTER_ADDR"} | {"NNODES": "2"}
    command = ["bash", str(ROOT / "launch" / "torchrun.sh"), "finetune"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 2
    assert done.stderr.startswith("torchrun.sh: NNODES=2 without MASTER_ADDR: ")
