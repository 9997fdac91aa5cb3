# SPDX-License-Identifier: Apache-2.0
"""How a process finds its place among srun's, mpirun's and torchrun's tasks: right, or refused in one line. Pure Python.

The variables are those that SLURM 22.05 sets in each place; tests/slurm runs a plain srun for real.
"""

from __future__ import annotations

from typing import Any

import pytest

from nemo_tied_lora.errors import ConfigError
from nemo_tied_lora.launching.task_ranks import adopt, first_host, others_say_it
from nemo_tied_lora.planning.rank_variables import is_first, is_rank

Variables = dict[str, str]


def step(task: int = 0, count: int = 8, nodes: int = 1, **more: str) -> Variables:
    """What srun sets for a task of a step that is spread evenly over nodes."""
    each = count // nodes
    return {
        "SLURM_JOB_ID": "4242",
        "SLURM_STEP_ID": "0",
        "SLURM_NTASKS": str(count),
        "SLURM_STEP_NUM_TASKS": str(count),
        "SLURM_STEP_NUM_NODES": str(nodes),
        "SLURM_STEP_TASKS_PER_NODE": f"{each}(x{nodes})" if nodes > 1 else str(each),
        "SLURM_STEP_NODELIST": f"localhost,gpu[02-{nodes + 1:02}]",
        "SLURM_PROCID": str(task),
        "SLURM_LOCALID": str(task % each),
        "SLURM_NODEID": str(task // each),
        **more,
    }


def batch(**more: str) -> Variables:
    """What sbatch sets for its script, with --nodes=2 --ntasks-per-node=8."""
    sizes = {
        "SLURM_NTASKS": "16",
        "SLURM_NTASKS_PER_NODE": "8",
        "SLURM_TASKS_PER_NODE": "8(x2)",
        "SLURM_JOB_NUM_NODES": "2",
    }
    place = {"SLURM_JOB_ID": "4242", "SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_NODEID": "0"}
    return {**sizes, **place, "ENVIRONMENT": "BATCH", **more}


def torchrun(rank: int = 0, world: int = 8, local_world: int = 8, agents: int = 1) -> Variables:
    numbers = {"RANK": rank, "WORLD_SIZE": world, "LOCAL_RANK": rank % local_world, "LOCAL_WORLD_SIZE": local_world}
    numbers |= {"GROUP_WORLD_SIZE": agents, "GROUP_RANK": rank // local_world, "MASTER_PORT": 29500}
    return {**{k: str(v) for k, v in numbers.items()}, "MASTER_ADDR": "127.0.0.1", "TORCHELASTIC_RUN_ID": "none"}


def mpirun(rank: int = 1, count: int = 4, **more: str) -> Variables:
    sizes = {"OMPI_COMM_WORLD_SIZE": str(count), "OMPI_COMM_WORLD_LOCAL_SIZE": str(count)}
    return {"OMPI_COMM_WORLD_RANK": str(rank), "OMPI_COMM_WORLD_LOCAL_RANK": str(rank), **sizes, **more}


def without(variables: Variables, *names: str) -> Variables:
    return {name: value for name, value in variables.items() if name not in names}


MASTER = {"MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "29500"}

RANKS: dict[str, tuple[Variables, dict[str, Any]]] = {
    "srun on one node": (
        step(3),
        {"RANK": "3", "WORLD_SIZE": "8", "LOCAL_RANK": "3", "LOCAL_WORLD_SIZE": "8", "MASTER_ADDR": "127.0.0.1"},
    ),
    "srun on two nodes": (
        step(11, 16, 2),
        {"RANK": "11", "WORLD_SIZE": "16", "LOCAL_RANK": "3", "NODE_RANK": "1", "MASTER_ADDR": "localhost"},
    ),
    "srun in an sbatch script": (
        {**batch(), **step(9, 16, 2)},
        {"RANK": "9", "WORLD_SIZE": "16", "LOCAL_RANK": "1"},
    ),
    "only SLURM_NTASKS beside the step's number": (
        without(step(5), "SLURM_STEP_NUM_TASKS", "SLURM_STEP_TASKS_PER_NODE", "SLURM_STEP_NUM_NODES"),
        {"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "5"},
    ),
    "only the tasks per node of the step": (
        without(step(11, 16, 2), "SLURM_STEP_NUM_TASKS", "SLURM_NTASKS"),
        {"RANK": "11", "WORLD_SIZE": "16", "LOCAL_RANK": "3"},
    ),
    "only the tasks per node of the job": (
        {
            **without(step(0, 16, 2), "SLURM_STEP_NUM_TASKS", "SLURM_NTASKS", "SLURM_STEP_TASKS_PER_NODE"),
            "SLURM_TASKS_PER_NODE": "8(x2)",
        },
        {"RANK": "0", "WORLD_SIZE": "16", "LOCAL_WORLD_SIZE": "8"},
    ),
    "no number of the step": (without(step(5), "SLURM_STEP_ID"), {"RANK": "5", "WORLD_SIZE": "8"}),
    "an address and a port of the user": (step(3, **MASTER), {"RANK": "3", **MASTER}),
    "WORLD_SIZE from the user's script": (step(3, WORLD_SIZE="8"), {"RANK": "3", "WORLD_SIZE": "8"}),
    "RANK from the user's script": (step(3, RANK="3"), {"RANK": "3", "WORLD_SIZE": "8", "LOCAL_RANK": "3"}),
    "all but the address, from the user's script": (
        step(3, RANK="3", WORLD_SIZE="8", LOCAL_RANK="3"),
        {"MASTER_ADDR": "127.0.0.1"},
    ),
    "srun --mpi=pmi2": (step(3, PMI_RANK="3", PMI_SIZE="8"), {"RANK": "3", "MASTER_ADDR": "127.0.0.1"}),
    "srun with reserved ports": (step(3, SLURM_STEP_RESV_PORTS="12000-12001"), {"MASTER_PORT": "12000"}),
    "one group of a heterogeneous job": (step(3, SLURM_HET_SIZE="2"), {"RANK": "3", "WORLD_SIZE": "8"}),
    "uneven nodes": (  # refused by `launcher_problems`, with the layout
        step(9, 12, 2, SLURM_STEP_TASKS_PER_NODE="8,4", SLURM_LOCALID="1"),
        {"RANK": "9", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "4"},
    ),
    "mpirun with an address": (mpirun(**MASTER), {"RANK": "1", "WORLD_SIZE": "4", "LOCAL_RANK": "1", **MASTER}),
    "mpiexec of MPICH": (
        {"PMI_RANK": "2", "PMI_SIZE": "4", "MPI_LOCALRANKID": "0", **MASTER},
        {"RANK": "2", "WORLD_SIZE": "4", "LOCAL_RANK": "0"},
    ),
    "mpirun in an sbatch script": (batch(**mpirun(**MASTER)), {"RANK": "1", "WORLD_SIZE": "4"}),
    "mpirun whose daemon srun has started": (
        {**step(1, 2, 2), **mpirun(3, 4, OMPI_COMM_WORLD_LOCAL_SIZE="2", OMPI_COMM_WORLD_LOCAL_RANK="1", **MASTER)},
        {"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1"},
    ),
    "torchrun": (torchrun(3), {"RANK": "3", "LOCAL_RANK": "3"}),
    "torchrun in an sbatch script": (batch(**torchrun(3)), {"RANK": "3"}),
    "torchrun where only some of SLURM's variables are passed on": (
        {"SLURM_NTASKS": "16", "SLURM_PROCID": "0", **torchrun(3)},
        {"RANK": "3"},
    ),
    "torchrun in srun's only task": ({**step(0, 1), **torchrun(3)}, {"RANK": "3"}),
    "torchrun as the only task of each node": ({**step(1, 2, 2), **torchrun(11, 16, 8, 2)}, {"RANK": "11"}),
    "another launcher as the only task of each node": (
        {**step(1, 2, 2), "RANK": "11", "WORLD_SIZE": "16", "LOCAL_RANK": "3", **MASTER},
        {"RANK": "11"},
    ),
    "one rank without an address": ({"RANK": "0", "WORLD_SIZE": "1"}, {"LOCAL_RANK": "0"}),
}


@pytest.mark.parametrize("name", RANKS)
def test_a_task_of_several_becomes_a_rank(name: str) -> None:
    given, expected = RANKS[name]
    found = dict(given)
    adopt(found)
    assert {key: found[key] for key in expected} == expected
    assert is_rank(found)
    if found["WORLD_SIZE"] != "1":
        assert 0 < int(found["MASTER_PORT"]) < 65536


ALONE: dict[str, Variables] = {
    "no launcher": {},
    "an sbatch script": batch(),
    "an sbatch script of one node": batch(SLURM_NTASKS="8", SLURM_JOB_NUM_NODES="1", SLURM_TASKS_PER_NODE="8"),
    "a shell of salloc": {"SLURM_JOB_ID": "1", "SLURM_NTASKS": "16", "SLURM_TASKS_PER_NODE": "8(x2)"},
    "a shell of salloc in an interactive step": step(0, 1, SLURM_STEP_ID="4294967290", SLURM_NTASKS="8"),
    "srun's only task": step(0, 1),
    "a terminal of one task": step(0, 1, SLURM_PTY_PORT="4000"),
    "an sbatch script that was submitted from srun's only task": batch(**step(0, 1)),
    "WORLD_SIZE=1": {"WORLD_SIZE": "1"},
    "mpirun -np 1": mpirun(0, 1),
}


@pytest.mark.parametrize("name", ALONE)
def test_a_process_that_is_alone_starts_its_own_ranks(name: str) -> None:
    found = dict(ALONE[name])
    adopt(found)
    assert not is_rank(found)


REFUSED: dict[str, tuple[Variables, list[str]]] = {
    "torchrun in each task of one node": (
        {**step(3), **torchrun(0)},
        ["torchrun runs in each of 8 tasks, several on one node, with 8 ranks each: 64 processes"],
    ),
    "torchrun's rank that has its task's number": ({**step(3), **torchrun(3)}, ["torchrun runs in each of 8 tasks"]),
    "torchrun --standalone on each of two nodes": (
        {**step(1, 2, 2), **torchrun(3)},
        ["torchrun runs on each of 2 nodes, but WORLD_SIZE=8 says that each is a run of its own"],
    ),
    "torchrun under mpirun": ({**mpirun(1, 4), **torchrun(0)}, ["torchrun runs in each of 4 tasks"]),
    "RANK left over from a shell": (
        step(3, RANK="0", WORLD_SIZE="1", LOCAL_RANK="0", **MASTER),
        ["RANK=0, WORLD_SIZE=1, but this is task 3 of the 8 that srun started"],
    ),
    "the same RANK for every task": (
        step(3, RANK="0", WORLD_SIZE="8", LOCAL_RANK="0", **MASTER),
        ["RANK=0, WORLD_SIZE=8, but this is task 3"],
    ),
    "WORLD_SIZE of another size": (step(3, WORLD_SIZE="16"), ["WORLD_SIZE=16, but srun started 8 tasks"]),
    "a heterogeneous step": (
        step(9, 8, SLURM_HET_SIZE="2", SLURM_NTASKS="12"),
        ["SLURM_HET_SIZE=2: the groups of a heterogeneous job cannot share one run"],
    ),
    "a later group of a heterogeneous step, with one task": (
        step(1, 1, SLURM_HET_SIZE="2"),
        ["SLURM_HET_SIZE=2: the groups of a heterogeneous job cannot share one run"],
    ),
    "a later task of a step of one": (step(1, 1), ["SLURM_PROCID=1: must be less than SLURM_STEP_NUM_TASKS=1"]),
    "the first task of a step whose size nobody states": (
        {"SLURM_STEP_ID": "0", "SLURM_PROCID": "0"},
        ["SLURM_PROCID=0, SLURM_NTASKS=not set, but neither"],
    ),
    "the first task where only the job's tasks per node are known": (
        {"SLURM_PROCID": "0", "SLURM_TASKS_PER_NODE": "8(x2)"},
        ["SLURM_PROCID=0, SLURM_NTASKS=16, but neither"],
    ),
    "a terminal of eight tasks": (step(0, SLURM_PTY_PORT="4000"), ["this terminal (srun --pty) is one of 8 tasks"]),
    "no SLURM_PROCID": (without(step(), "SLURM_PROCID"), ["SLURM_STEP_NUM_TASKS=8 without SLURM_PROCID"]),
    "neither srun's nor sbatch's mark": (
        {"SLURM_NTASKS": "8", "SLURM_PROCID": "0", "SLURM_LOCALID": "0"},
        ["one of several tasks, or alone?"],
    ),
    "a later task without srun's mark": (
        {"SLURM_NTASKS": "8", "SLURM_PROCID": "5"},
        ["SLURM_PROCID=5, SLURM_NTASKS=8"],
    ),
    "a task beyond the last": (step(8), ["SLURM_PROCID=8: must be less than SLURM_STEP_NUM_TASKS=8"]),
    "a task that is not a number": (step(SLURM_PROCID="x"), ["SLURM_PROCID='x': must be a whole number"]),
    "nodes that nobody names": (
        without(step(11, 16, 2), "SLURM_STEP_NODELIST"),
        ["MASTER_ADDR: not set, and SLURM_STEP_NODELIST does not name the nodes"],
    ),
    "a node without an address": (
        step(11, 16, 2, SLURM_STEP_NODELIST="no-such-host.invalid,b"),
        ["the node no-such-host.invalid has no known address"],
    ),
    "no SLURM_LOCALID": (without(step(11, 16, 2), "SLURM_LOCALID"), ["LOCAL_RANK: not set"]),
    "mpirun without an address": (mpirun(), ["MASTER_ADDR, MASTER_PORT: not set; set them for all ranks"]),
    "half of mpirun's variables": ({"OMPI_COMM_WORLD_SIZE": "4"}, ["without OMPI_COMM_WORLD_RANK"]),
    "WORLD_SIZE alone": ({"WORLD_SIZE": "8"}, ["WORLD_SIZE=8 without RANK"]),
    "RANK alone": ({"RANK": "0"}, ["RANK=0 without WORLD_SIZE"]),
    "RANK beyond the last": ({"RANK": "8", "WORLD_SIZE": "8", **MASTER}, ["RANK=8: must be less than WORLD_SIZE=8"]),
    "RANK negative": ({"RANK": "-1", "WORLD_SIZE": "8", **MASTER}, ["RANK='-1': must be a whole number"]),
    "RANK and WORLD_SIZE not numbers": (
        {"RANK": "zero", "WORLD_SIZE": "", **MASTER},
        ["RANK='zero': must be", "WORLD_SIZE='': must be"],
    ),
    "no address": (
        {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1", "MASTER_PORT": "1"},
        ["MASTER_ADDR: not set; set them for all ranks, to rank 0's node"],
    ),
    "no port": (
        {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1", "MASTER_ADDR": "n1"},
        ["MASTER_PORT: not set"],
    ),
    "a port that is none": (torchrun() | {"MASTER_PORT": "99999"}, ["MASTER_PORT='99999': must be a port"]),
    "no LOCAL_RANK": (
        {"RANK": "1", "WORLD_SIZE": "2", **MASTER},
        ["LOCAL_RANK: not set, but RANK is"],
    ),
    "LOCAL_RANK not a number": (torchrun() | {"LOCAL_RANK": "gpu0"}, ["LOCAL_RANK='gpu0': must be a whole number"]),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_would_start_several_runs_or_hang_is_refused_in_one_line_each(name: str) -> None:
    given, parts = REFUSED[name]
    found = dict(given)
    with pytest.raises(ConfigError) as caught:
        adopt(found)
    problems = caught.value.problems
    assert len(problems) == len(parts), problems
    assert all(part in problem and "\n" not in problem for part, problem in zip(parts, problems, strict=True)), (
        problems
    )
    assert found == given


def test_tasks_of_one_step_agree_on_the_port_and_other_steps_and_jobs_have_another() -> None:
    def port(**names: str) -> str:
        found = step(**names)  # type: ignore[arg-type]
        adopt(found)
        return found["MASTER_PORT"]

    assert {port(task=task) for task in range(8)} == {port()}
    others = [
        port(SLURM_JOB_ID=str(job), SLURM_STEP_ID=str(number)) for job in range(4242, 4252) for number in range(8)
    ]
    assert len(set(others)) == len(others)
    assert port(SLURM_RESTART_COUNT="1") != port()


@pytest.mark.parametrize(
    ("nodes", "first"),
    [
        ("n1", "n1"),
        ("n1,n2", "n1"),
        ("gpu[03,07-09],cpu1", "gpu03"),
        ("gpu[003-010]-ib", "gpu003-ib"),
        ("r[1-2]n[05-08]", "r1n05"),
        ("node-a-[7]", "node-a-7"),
        ("n1.cluster.org,n2", "n1.cluster.org"),
        ("", ""),
    ],
)
def test_the_first_host_of_slurms_list_is_found_without_scontrol(nodes: str, first: str) -> None:
    assert first_host(nodes) == first


def test_only_the_first_task_prints_what_all_have_to_say() -> None:
    assert [is_first(step(task)) for task in range(3)] == [True, False, False]
    assert [is_first({**step(task), **torchrun(rank)}) for task in (0, 1) for rank in (0, 1)] == [True, *[False] * 3]
    assert is_first({})


def test_every_task_of_srun_prints_a_refusal_and_of_torchruns_ranks_the_first() -> None:
    def said_by_others(environment: Variables) -> bool:
        with pytest.raises(ConfigError) as caught:
            adopt(environment)
        return others_say_it(caught.value, environment)

    in_each = [{**step(task), **torchrun(rank)} for task in (0, 1) for rank in (0, 1)]
    assert [said_by_others(environment) for environment in in_each] == [False, True, False, True]
    assert not said_by_others(step(3, WORLD_SIZE="16"))
    assert not said_by_others(torchrun(3) | {"LOCAL_RANK": "gpu0"})
