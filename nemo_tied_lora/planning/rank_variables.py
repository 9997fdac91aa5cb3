# SPDX-License-Identifier: Apache-2.0
"""The environment variables that tell a process which rank it is, and which task of SLURM or MPI. Imports no torch."""

from __future__ import annotations

import os
import re
import select
from collections.abc import Mapping

__all__ = [
    "BROKEN_PIPE",
    "FAILURE_PIPE",
    "INTERRUPTED",
    "LAUNCHER",
    "MPI_VARIABLES",
    "STARTED_BY",
    "STORE_SOCKET",
    "another_rank_failed",
    "is_first",
    "is_rank",
    "tasks_on_nodes",
]

INTERRUPTED = 130
"""Exit code after Ctrl-C, as shells report it."""
BROKEN_PIPE = 141
"""Exit code if nobody reads the output any more, as shells report it."""
LAUNCHER = "TIED_LORA_LAUNCHER"
"""The number of the process of ours that has started this rank. All ranks that it started share one terminal or log."""
FAILURE_PIPE = "TIED_LORA_FAILURE_PIPE"
"""The number of a pipe from which a rank reads a byte if our launcher ends it because another rank has failed."""
STARTED_BY = "TIED_LORA_STARTED_BY"
"""The number of the process of ours that has started this command as one of its stages."""
STORE_SOCKET = "TIED_LORA_STORE_SOCKET"
"""The number of rank 0's open socket that listens at MASTER_PORT. So no other process can take the port."""
MPI_VARIABLES = (
    ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_RANK", "OMPI_COMM_WORLD_LOCAL_SIZE"),
    ("PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID", "MPI_LOCALNRANKS"),
    ("MV2_COMM_WORLD_RANK", "MV2_COMM_WORLD_SIZE", "MV2_COMM_WORLD_LOCAL_RANK", "MV2_COMM_WORLD_LOCAL_SIZE"),
    ("JSM_NAMESPACE_RANK", "JSM_NAMESPACE_SIZE", "JSM_NAMESPACE_LOCAL_RANK", "JSM_NAMESPACE_LOCAL_SIZE"),
    ("FLUX_TASK_RANK", "FLUX_JOB_SIZE", "FLUX_TASK_LOCAL_ID", ""),
)
"""(rank, number of ranks, rank on the node, ranks on the node) of Open MPI, of MPICH and Intel MPI, of MVAPICH, jsrun and Flux."""


def is_rank(environment: Mapping[str, str] = os.environ) -> bool:
    """Whether a launcher has started this process as a rank."""
    return "RANK" in environment and "WORLD_SIZE" in environment


def is_first(environment: Mapping[str, str] = os.environ) -> bool:
    """Whether this process prints what all tasks of a launcher have to say. True for a process that is alone."""
    names = ("RANK", "SLURM_PROCID", *(names[0] for names in MPI_VARIABLES))
    return all(environment.get(name, "0") == "0" for name in names)


def another_rank_failed(environment: Mapping[str, str] = os.environ) -> bool:
    """Whether a SIGTERM comes from our launcher after another rank's failure. It is then no request to save and stop."""
    number = environment.get(FAILURE_PIPE)
    if number is None or not select.select([int(number)], [], [], 0)[0]:
        return False
    return os.read(int(number), 1) != b""  # without a byte, the launcher has died


def tasks_on_nodes(text: str) -> list[int]:
    """Expands SLURM's "2(x3),1" to [2, 2, 2, 1]."""
    found = re.findall(r"(\d+)(?:\(x(\d+)\))?", text)
    return [int(tasks) for tasks, times in found for _ in range(int(times or 1))]
