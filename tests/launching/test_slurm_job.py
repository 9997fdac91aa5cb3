# SPDX-License-Identifier: Apache-2.0
"""The shell scripts: a SLURM job under each set of variables that sbatch may set. A fake srun notes what it was asked.

tests/slurm runs the script on a real SLURM.
"""

from __future__ import annotations

import os
import re
import subprocess
from collections.abc import Mapping
from pathlib import Path

import pytest

from tests.harness.paths import ROOT

PROGRAMS = {
    "srun": 'echo "srun $*" >> "$NOTES"; exit "${CODE-0}"',
    "scontrol": 'case $* in requeue*) echo "$*" >> "$NOTES" ;; *hostnames*) printf "n1\\nn2\\n" ;; '
    '*) echo "NodeName=n1 ${ADDRESS-NodeAddr=10.0.0.1}" ;; esac',
    "squeue": "echo RUNNING",
}


def run(
    folder: Path,
    *arguments: str,
    script: str = "finetune",
    settings: Mapping[str, str] | None = None,
    **variables: str,
) -> subprocess.CompletedProcess[str]:
    """Runs launch/slurm/SCRIPT.sbatch as sbatch would, with these lines edited, and these variables of SLURM and no others."""
    programs = folder / "bin"
    programs.mkdir(exist_ok=True)
    for name, body in PROGRAMS.items():
        (programs / name).write_text(f"#!/bin/bash\n{body}\n")
        (programs / name).chmod(0o755)
    clean = {name: value for name, value in os.environ.items() if not name.startswith("SLURM")}
    environment = {**clean, **variables, "PATH": f"{programs}:{os.environ['PATH']}", "NOTES": str(folder / "notes")}
    text = (ROOT / "launch" / "slurm" / f"{script}.sbatch").read_text()
    for name, value in (settings or {}).items():
        text, found = re.subn(rf"^{name}=.*$", f"{name}='{value}'", text, flags=re.M)
        assert found == 1, name
    (folder / "job.sbatch").write_text(text)
    command = ["bash", "job.sbatch", *arguments]
    return subprocess.run(
        command, env=environment, cwd=folder, capture_output=True, text=True, check=False, timeout=60
    )


JOB = {"SLURM_JOB_ID": "4242", "SLURM_JOB_NODELIST": "n[1-2]"}
TASKS = {"SLURM_NTASKS": "16", "SLURM_TASKS_PER_NODE": "8(x2)", "SLURM_JOB_NUM_NODES": "2"}
ARRAY = {"SLURM_ARRAY_JOB_ID": "4240", "SLURM_ARRAY_TASK_ID": "1"}

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
    done = run(tmp_path, "peft.rank=16", script="bridge", **JOB, **TASKS)
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


def test_each_task_of_an_array_takes_its_line_of_the_index(tmp_path: Path) -> None:
    """The index is written by hand: its last line does not end."""
    (tmp_path / "index.tsv").write_text("runs/a\tpeft.rank=2\nruns/b\tpeft.rank=8\t--preset=vera")
    done = run(tmp_path, script="bridge", settings={"index": "index.tsv"}, **JOB, **TASKS, **ARRAY)
    assert done.returncode == 0, done.stdout + done.stderr
    ranks = (tmp_path / "notes").read_text()
    assert "--folder runs/b " in ranks
    assert ranks.endswith(" model.tensor_model_parallel_size=8 peft.rank=8 --preset=vera\n")
    assert (tmp_path / "runs" / "b" / "logs" / "4240_1.finished").exists()


SETTINGS_REFUSED: dict[str, tuple[dict[str, str], dict[str, str], str]] = {
    "an array without an index": (
        {},
        ARRAY,
        "a job array, but index='': all tasks would write into folder=runs/tied_lora; ",
    ),
    "an index without an array": (
        {"index": "index.tsv"},
        {},
        "index=index.tsv, but the job is not an array; submit it with --array=0-N, or set index=''",
    ),
    "an index that is missing": (
        {"index": "other.tsv"},
        ARRAY,
        "index=other.tsv: cannot be read; give one line per task",
    ),
    "an index that is too short": (
        {"index": "index.tsv"},
        {**ARRAY, "SLURM_ARRAY_TASK_ID": "3"},
        "index=index.tsv: line 4, for array task 3, does not begin with a run's folder; add it, or submit fewer tasks",
    ),
    "an empty line of the index": (
        {"index": "index.tsv"},
        ARRAY,
        "index=index.tsv: line 2, for array task 1, does not begin",
    ),
    "a line that begins with an argument": (
        {"index": "index.tsv"},
        {**ARRAY, "SLURM_ARRAY_TASK_ID": "2"},
        "index=index.tsv: line 3, for array task 2, does not begin with a run's folder",
    ),
    "no folder": ({"folder": ""}, {}, "folder='': name the run's folder"),
    "a relative folder in a container": (
        {"container_image": "/shared/image.sqsh", "container_mounts": "/shared:/shared"},
        {},
        "folder=runs/tied_lora: inside the container this would be another one; name an absolute path that container_mounts ",
    ),
    "a relative folder of the index in a container": (
        {"container_image": "/shared/image.sqsh", "index": "index.tsv"},
        {**ARRAY, "SLURM_ARRAY_TASK_ID": "0"},
        "folder=runs/a: inside the container this would be another one; ",
    ),
}


@pytest.mark.parametrize("name", SETTINGS_REFUSED)
def test_settings_under_which_runs_would_be_lost_or_mixed_are_refused_in_one_line(name: str, tmp_path: Path) -> None:
    settings, variables, line = SETTINGS_REFUSED[name]
    (tmp_path / "index.tsv").write_text("runs/a\tpeft.rank=2\n\n\tpeft.rank=8\n")
    done = run(tmp_path, script="bridge", settings=settings, **JOB, **TASKS, **variables)
    assert done.returncode == 2
    assert f": refused: {line}" in done.stdout
    assert (done.stdout.count("\n"), done.stderr) == (1, "")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bin", "index.tsv", "job.sbatch"]


IN_A_CONTAINER = 'while [[ $1 == --* ]]; do shift; done; [[ $1 != rank ]] || exit 0; {hidden}; "$@"'


@pytest.mark.parametrize(("hidden", "code"), [("true", 0), ('mv "$FOLDER" "$FOLDER.outside"', 2)])
def test_a_container_that_does_not_show_the_runs_folder_is_refused_before_the_ranks_start(
    hidden: str, code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The fake srun hides the folder from the first step, as an image does whose mounts do not contain it."""
    folder = tmp_path / "runs" / "german"
    first = f'echo "srun $*" >> "$NOTES"; {IN_A_CONTAINER.format(hidden=hidden)}'
    monkeypatch.setitem(PROGRAMS, "srun", first)
    settings = {"folder": str(folder), "container_image": "/shared/image.sqsh", "python": "true"}
    done = run(tmp_path, script="bridge", settings=settings, FOLDER=str(folder), **JOB, **TASKS)
    assert done.returncode == code, done.stdout + done.stderr
    missing = (
        f"refused: {folder}/logs/4242-0/job.sbatch is not there inside the container; let container_mounts show the "
    )
    assert (missing in done.stdout, "refused; not started" in done.stdout) == (code == 2, code == 2)
    assert (tmp_path / "notes").read_text().count("srun ") == (1 if code else 2)


@pytest.mark.parametrize("script", ["finetune", "bridge"])
@pytest.mark.parametrize(("code", "requeued"), [("1", False), ("127", False), ("2", False), ("137", True)])
def test_a_first_step_that_fails_by_its_own_mistake_is_not_repeated(
    script: str, code: str, requeued: bool, tmp_path: Path
) -> None:
    done = run(tmp_path, script=script, CODE=code, **JOB, **TASKS)
    assert done.returncode == int(code)
    notes = (tmp_path / "notes").read_text().splitlines()
    assert len([line for line in notes if line.startswith("srun")]) == 1
    assert ("requeue 4242" in notes) == requeued, done.stdout
    assert ("before any rank has started: not requeued" in done.stdout) == (code in ("1", "127"))


def test_a_first_step_that_fails_at_a_later_start_is_the_nodes_trouble_and_the_job_is_requeued(tmp_path: Path) -> None:
    earlier = tmp_path / "runs" / "tied_lora" / "logs" / "4242-0"
    earlier.mkdir(parents=True)
    (earlier / "node-0.log").touch()  # srun makes it when the ranks start
    for restart, requeued in (("1", 1), ("5", 1)):
        done = run(tmp_path, script="bridge", CODE="1", SLURM_RESTART_COUNT=restart, **JOB, **TASKS)
        assert done.returncode == 1
        assert (tmp_path / "notes").read_text().count("requeue 4242\n") == requeued, done.stdout
    assert "after 5 restarts: not requeued again (max_requeues=5)" in done.stdout


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
