# SPDX-License-Identifier: Apache-2.0
"""Makes each task that srun or mpirun started a rank, as NeMo does, or refuses in one line. Imports no torch.

A rank is told its place by torch's variables: RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR, MASTER_PORT. torchrun sets them. srun
and mpirun set variables of their own, which `adopt` translates. Without either, the process is alone and starts its own ranks.

How srun's tasks are told from an sbatch script, a shell of salloc and a shell of `srun --pty`: only srun sets SLURM_STEP_ID
and SLURM_STEP_NUM_TASKS for the tasks that it starts. In the other places SLURM_NTASKS tells what was asked for, not what runs.
"""

from __future__ import annotations

import os
import re
import shutil
import socket
import subprocess
from collections.abc import Mapping, MutableMapping
from dataclasses import dataclass

from nemo_tied_lora.errors import ConfigError, Problems
from nemo_tied_lora.planning.rank_variables import MPI_VARIABLES, tasks_on_nodes

__all__ = ["Tasks", "adopt", "find_tasks", "first_host", "others_say_it"]


# Numbers that SLURM gives to steps that srun did not start: interactive, batch, extern.
_NOT_OF_SRUN = ("4294967290", "4294967291", "4294967292", "interactive", "batch", "extern")
# As in slurm_job.sh: below the ports of outgoing connections.
_FIRST_PORT, _NUM_PORTS = 20000, 12000


@dataclass(frozen=True)
class Tasks:
    """The tasks that one srun or mpirun started, and which of them this process is."""

    launcher: str
    rank: int
    count: int
    size_name: str
    """The variable that `count` comes from."""
    local_rank: int | None
    on_this_node: int | None
    """None: unknown."""
    num_nodes: int | None


def adopt(environment: MutableMapping[str, str] = os.environ) -> None:
    """Sets torch's variables if srun or mpirun started this process as one of several tasks, and checks them if they are set.

    Does nothing in a process that is alone.

    Raises:
        ConfigError: the variables are incomplete, contradict each other, or several launchers were combined in a way
            that would start more than one run.
    """
    problems = Problems()
    tasks = problems.attempt(find_tasks, environment)
    if "RANK" in environment:  # then it does not matter what srun's variables leave open
        _check_given(environment, tasks)
        return
    problems.raise_if_any()
    if tasks is not None:
        _become_rank(environment, tasks)
    elif environment.get("WORLD_SIZE", "1") != "1":
        raise ConfigError(
            [
                f"WORLD_SIZE={environment['WORLD_SIZE']} without RANK: the launcher must set both; unset WORLD_SIZE to let "
                "the command start its own ranks"
            ]
        )


def others_say_it(error: ConfigError, environment: Mapping[str, str] = os.environ) -> bool:
    """Whether this is a rank of torchrun whose rank 0 prints the same. srun's tasks all print: each may have its own log."""
    if "TORCHELASTIC_RUN_ID" not in environment or environment.get("RANK", "0") == "0":
        return False
    problems = Problems()
    problems.attempt(adopt, {**environment, "RANK": "0", "LOCAL_RANK": "0"})
    return set(error.problems) == set(problems)


def find_tasks(environment: Mapping[str, str] = os.environ) -> Tasks | None:
    """Returns the tasks of srun or mpirun that this process is one of. None: it is alone.

    Raises:
        ConfigError: the launcher's variables do not say whether it is.
    """
    return _mpi_tasks(environment) or _slurm_tasks(environment)


def first_host(nodes: str) -> str:
    """Returns the first host of SLURM's list: "gpu03" of "gpu[03,07-09],cpu1". Needs no scontrol, which containers lack."""
    first = re.match(r"(?:\[[^\]]*\]|[^,\s\[])*", nodes.strip())
    return re.sub(r"\[\s*([^\],-]*)[^\]]*\]", r"\1", first[0] if first else "")


def _mpi_tasks(environment: Mapping[str, str]) -> Tasks | None:
    for rank_name, size_name, local_name, on_node_name in MPI_VARIABLES:
        if environment.get(size_name, "1") == "1":
            continue
        if rank_name not in environment:
            raise ConfigError(
                [f"{size_name}={environment[size_name]} without {rank_name}: pass it on to the tasks too"]
            )
        if rank_name == "PMI_RANK" and environment["PMI_RANK"] == environment.get("SLURM_PROCID"):
            continue  # srun --mpi=pmi2
        return _tasks(environment, "mpirun", rank_name, size_name, local_name, on_node_name)
    return None


def _slurm_tasks(environment: Mapping[str, str]) -> Tasks | None:
    """The tasks of srun. None: SLURM runs this process as a batch script, in a shell, or as the only task."""
    step = environment.get("SLURM_STEP_ID", environment.get("SLURM_STEPID"))
    asked = environment.get("SLURM_NTASKS", environment.get("SLURM_NPROCS")) or _sum_of(
        environment, "SLURM_TASKS_PER_NODE"
    )
    stated = environment.get("SLURM_STEP_NUM_TASKS") or _sum_of(environment, "SLURM_STEP_TASKS_PER_NODE")
    started = stated or (asked if step is not None else None)
    if step in _NOT_OF_SRUN:
        return None
    if "SLURM_PROCID" not in environment:
        if started is None or started == "1" or step is None:
            return None  # a login node, or a shell of salloc
        raise ConfigError([f"SLURM_STEP_NUM_TASKS={started} without SLURM_PROCID: {_PASS_ON}"])
    if started is None:
        first = environment["SLURM_PROCID"] == "0" and step is None
        if environment.get("ENVIRONMENT") == "BATCH" or (asked in (None, "1") and first):
            return None
        raise ConfigError(
            [
                f"SLURM_PROCID={environment['SLURM_PROCID']}, SLURM_NTASKS={asked or 'not set'}, but neither srun's "
                f"SLURM_STEP_NUM_TASKS nor sbatch's ENVIRONMENT=BATCH: one of several tasks, or alone? {_PASS_ON}"
            ]
        )
    if started == "1" and environment["SLURM_PROCID"] == "0":
        return None
    size_name = "SLURM_STEP_NUM_TASKS" if stated else "SLURM_NTASKS"
    tasks = _tasks({**environment, size_name: started}, "srun", "SLURM_PROCID", size_name, "SLURM_LOCALID", "")
    _check_step(environment, tasks)
    each = tasks_on_nodes(_first_of(environment, "SLURM_STEP_TASKS_PER_NODE", "SLURM_TASKS_PER_NODE"))
    node = environment.get("SLURM_NODEID", "0")
    here = each[int(node)] if node.isdigit() and int(node) < len(each) else None
    nodes = _first_of(environment, "SLURM_STEP_NUM_NODES", "SLURM_NNODES", "SLURM_JOB_NUM_NODES")
    num_nodes = int(nodes) if nodes.isdigit() else len(each) or None
    return Tasks(**{**vars(tasks), "on_this_node": here, "num_nodes": num_nodes})


_PASS_ON = "set RANK, WORLD_SIZE and LOCAL_RANK for each task, or pass all of SLURM's variables into the container"


def _check_step(environment: Mapping[str, str], tasks: Tasks) -> None:
    groups = environment.get("SLURM_HET_SIZE", "1")
    whole = environment.get("SLURM_NTASKS", str(tasks.count))
    if groups != "1" and (tasks.rank >= tasks.count or whole != str(tasks.count)):
        raise ConfigError(
            [
                f"SLURM_HET_SIZE={groups}: the groups of a heterogeneous job cannot share one run, because its nodes must hold "
                "the same number of ranks; start it on one group: srun --het-group=0"
            ]
        )
    if "SLURM_PTY_PORT" in environment and "RANK" not in environment:
        raise ConfigError(
            [
                f"{tasks.size_name}={tasks.count}: this terminal (srun --pty) is one of {tasks.count} tasks, and the others do not "
                "run the command; open it with --ntasks=1, or leave --pty out"
            ]
        )


def _tasks(
    environment: Mapping[str, str], launcher: str, rank_name: str, size_name: str, local_name: str, on_node_name: str
) -> Tasks:
    problems = Problems()
    rank = problems.attempt(_whole, environment, rank_name)
    count = problems.attempt(_whole, environment, size_name)
    local = problems.attempt(_whole, environment, local_name) if local_name in environment else None
    if rank is not None and count is not None and rank >= count and environment.get("SLURM_HET_SIZE", "1") == "1":
        problems.append(f"{rank_name}={rank}: must be less than {size_name}={count}")
    problems.raise_if_any()
    assert rank is not None
    assert count is not None
    here = environment.get(on_node_name, "")
    on_this_node = int(here) if here.isdigit() else None
    return Tasks(launcher, rank, count, size_name, local, on_this_node, 1 if on_this_node == count else None)


def _become_rank(environment: MutableMapping[str, str], tasks: Tasks) -> None:
    problems = Problems()
    given = environment.get("WORLD_SIZE", str(tasks.count))
    if given not in ("1", str(tasks.count)):
        problems.append(f"WORLD_SIZE={given}, but {tasks.launcher} started {tasks.count} tasks; unset it")
    found = {"RANK": str(tasks.rank), "WORLD_SIZE": str(tasks.count)}
    if "LOCAL_RANK" not in environment or tasks.local_rank is not None:
        local = tasks.local_rank if tasks.num_nodes != 1 or tasks.local_rank is not None else tasks.rank
        if local is None:
            problems.append(f"LOCAL_RANK: not set, and {tasks.launcher} does not say it; set it for each task")
        found["LOCAL_RANK"] = str(local)
    found |= problems.attempt(_master, environment, tasks) or {}
    problems.raise_if_any()
    if tasks.on_this_node is not None:
        found["LOCAL_WORLD_SIZE"] = str(tasks.on_this_node)
    if tasks.launcher == "srun":
        found["NODE_RANK"] = environment.get("SLURM_NODEID", "0")
    environment.update(found)


def _check_given(environment: MutableMapping[str, str], tasks: Tasks | None) -> None:
    """Checks torch's variables, which torchrun or the user has set, and adds those that follow from others."""
    if "WORLD_SIZE" not in environment:
        if tasks is None or environment["RANK"] != str(tasks.rank):
            raise ConfigError(
                [
                    f"RANK={environment['RANK']} without WORLD_SIZE: the launcher must set both; unset RANK to let the command "
                    "start its own ranks"
                ]
            )
        environment["WORLD_SIZE"] = str(tasks.count)
    problems = Problems()
    rank, world = (problems.attempt(_whole, environment, name) for name in ("RANK", "WORLD_SIZE"))
    problems.raise_if_any()
    assert rank is not None
    assert world is not None
    if rank >= world:
        raise ConfigError([f"RANK={rank}: must be less than WORLD_SIZE={world}"])
    if tasks is not None:
        _check_combination(environment, tasks, world)
    found = {}
    if "LOCAL_RANK" in environment:
        problems.attempt(_whole, environment, "LOCAL_RANK")
    elif tasks is not None and tasks.local_rank is not None and tasks.count == world:
        found["LOCAL_RANK"] = str(tasks.local_rank)
    elif world == 1 or environment.get("LOCAL_WORLD_SIZE") == str(world):
        found["LOCAL_RANK"] = str(rank)
    else:
        problems.append("LOCAL_RANK: not set, but RANK is; the launcher must say which GPU is this rank's")
    if world > 1:
        found |= problems.attempt(_master, environment, tasks if tasks and tasks.count == world else None) or {}
    problems.raise_if_any()
    environment.update(found)


def _check_combination(environment: Mapping[str, str], tasks: Tasks, world: int) -> None:
    """Several tasks, each of which has torch's variables already: either one launcher in another, or a wrapper script."""
    torchrun = "TORCHELASTIC_RUN_ID" in environment
    if not torchrun and world == tasks.count and environment["RANK"] == str(tasks.rank):
        return  # a script has translated them: RANK=$SLURM_PROCID
    each = int(environment["LOCAL_WORLD_SIZE"]) if environment.get("LOCAL_WORLD_SIZE", "").isdigit() else world
    alone = tasks.on_this_node == 1 or tasks.count == tasks.num_nodes
    if not torchrun:
        if alone and world % tasks.count == 0 and world > tasks.count:
            return  # another launcher of one node's ranks
        raise ConfigError(
            [
                f"RANK={environment['RANK']}, WORLD_SIZE={world}, but this is task {tasks.rank} of the {tasks.count} that "
                f"{tasks.launcher} started; unset both: each task becomes a rank"
            ]
        )
    if not alone:
        raise ConfigError(
            [
                f"{tasks.size_name}={tasks.count}: torchrun runs in each of {tasks.count} tasks, several on one node, with {each} "
                f"ranks each: {tasks.count * each} processes; leave torchrun out, or {tasks.launcher} starts one task per node"
            ]
        )
    if environment.get("GROUP_WORLD_SIZE") != str(tasks.count):
        raise ConfigError(
            [
                f"{tasks.size_name}={tasks.count}: torchrun runs on each of {tasks.count} nodes, but WORLD_SIZE={world} says that "
                f"each is a run of its own; use torchrun --nnodes={tasks.count} --rdzv-backend=c10d --rdzv-endpoint=HOST:PORT"
            ]
        )


def _master(environment: Mapping[str, str], tasks: Tasks | None) -> dict[str, str]:
    """Returns MASTER_ADDR and MASTER_PORT where they are not set. Every task finds the same.

    Raises:
        ConfigError: they do not follow from the launcher's variables, or the port is not one.
    """
    found, problems = {}, Problems()
    missing = [name for name in ("MASTER_ADDR", "MASTER_PORT") if not environment.get(name)]
    if missing and (tasks is None or tasks.launcher != "srun"):
        problems.append(
            f"{', '.join(missing)}: not set; set them for all ranks, to rank 0's node and a free port there"
        )
    elif missing:
        assert tasks is not None
        found = {"MASTER_PORT": str(_port(environment))} if "MASTER_PORT" in missing else {}
        if "MASTER_ADDR" in missing:
            found["MASTER_ADDR"] = problems.attempt(_address, environment, tasks) or ""
    port = environment.get("MASTER_PORT")
    if port and not (port.isdigit() and 0 < int(port) < 65536):
        problems.append(f"MASTER_PORT={port!r}: must be a port, from 1 to 65535")
    problems.raise_if_any()
    return found


def _address(environment: Mapping[str, str], tasks: Tasks) -> str:
    if tasks.num_nodes == 1:
        return "127.0.0.1"
    names = ("SLURM_STEP_NODELIST", "SLURM_JOB_NODELIST", "SLURM_NODELIST")
    host = first_host(_first_of(environment, *names))
    if not host:
        raise ConfigError([f"MASTER_ADDR: not set, and {names[0]} does not name the nodes; set it to rank 0's node"])
    if not _resolves(host):
        told = _address_by_scontrol(host)
        if told is None:
            raise ConfigError([f"MASTER_ADDR: not set, and the node {host} has no known address here; set it"])
        return told
    return host


def _resolves(host: str) -> bool:
    try:
        socket.getaddrinfo(host, None)
    except OSError:
        return False
    return True


def _address_by_scontrol(host: str) -> str | None:
    """SLURM's own address of a node, which works even if host names do not resolve. None: scontrol cannot be asked."""
    if shutil.which("scontrol") is None:
        return None
    command = ["scontrol", "--oneliner", "show", "node", host]
    try:
        told = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return None
    address = re.search(r"NodeAddr=(\S+)", told)
    return address and address[1]


def _port(environment: Mapping[str, str]) -> int:
    """A port for the step: one that SLURM has reserved, else one that differs between jobs, steps and restarts."""
    reserved = re.match(r"\d+", environment.get("SLURM_STEP_RESV_PORTS", ""))
    if reserved:
        return int(reserved[0])
    names = ("SLURM_JOB_ID", "SLURM_STEP_ID", "SLURM_RESTART_COUNT")
    job, step, restart = (int(text) if (text := environment.get(name, "0")).isdigit() else 0 for name in names)
    # Jobs on one node have close numbers, and a job's steps run side by side.
    return _FIRST_PORT + (job * 8 + restart + step * 1009) % _NUM_PORTS


def _first_of(environment: Mapping[str, str], *names: str) -> str:
    return next((environment[name] for name in names if environment.get(name)), "")


def _sum_of(environment: Mapping[str, str], name: str) -> str | None:
    """The number of tasks in a list of SLURM's, as 16 in "8(x2)"."""
    return str(sum(tasks_on_nodes(environment.get(name, "")))) if environment.get(name) else None


def _whole(environment: Mapping[str, str], name: str) -> int:
    text = environment.get(name, "")
    if not (text.isascii() and text.isdigit()):
        raise ConfigError([f"{name}={text!r}: must be a whole number, set by the launcher"])
    return int(text)
