# SPDX-License-Identifier: Apache-2.0
"""One private SLURM per pytest process. Run these tests with `make test-slurm` or `pytest -m slurm tests/slurm`."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
from filelock import FileLock

from tests.slurm import private_cluster
from tests.slurm.private_cluster import PrivateCluster
from tests.slurm.real_runs import PP2, Run, launch


@pytest.fixture(scope="session")
def slurm() -> Iterator[PrivateCluster]:
    """A SLURM with two idle nodes. Skips, with the reason, if Debian's packages are missing and cannot be installed."""
    with ExitStack() as stack:
        with FileLock(
            Path(tempfile.gettempdir()) / "private-slurm.lock"
        ):  # one pytest process installs, and finds free ports
            private_cluster.install()
            reason = private_cluster.why_not()
            if reason is not None:
                pytest.skip(f"needs a SLURM: {reason}")
            # Not in pytest's folder: its path is too long for a socket, and munge refuses a folder that others can write to.
            folder = Path(tempfile.mkdtemp(prefix="slurm-", dir="/tmp"))
            stack.callback(shutil.rmtree, folder, ignore_errors=True)
            cluster = stack.enter_context(PrivateCluster(folder, first_job=1 + _JOBS * _worker()))
        yield cluster


_JOBS = 500
"""Job numbers of each pytest process. A job's port follows from its number, and two SLURMs share this machine's ports."""


def _worker() -> int:
    return int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw"))


@pytest.fixture(scope="session")
def submitted(slurm: PrivateCluster, workshop: Path) -> dict[str, Run]:
    """The undisturbed runs, submitted together, so that their start-ups overlap: "two_nodes", and the array "sweep"."""
    two_nodes = launch(slurm, workshop, "two_nodes", *PP2, "rank=4", "preset=tl6")
    sweep = launch(slurm, workshop, "sweep", "cluster.nodes=1", "rank=2,4", "preset=tl6", "cluster.at_once=1")
    numbers = {"two_nodes": two_nodes, "sweep": sweep}
    return {name: Run(slurm, workshop / "runs" / name, job) for name, job in numbers.items()}


@pytest.fixture(scope="session")
def undisturbed(submitted: dict[str, Run]) -> Run:
    """The undisturbed run on two nodes, after its end."""
    submitted["two_nodes"].finish()
    return submitted["two_nodes"]
