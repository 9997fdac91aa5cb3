# SPDX-License-Identifier: Apache-2.0
"""One private SLURM for all tests of this folder. They run with `make test-slurm`, or `pytest -m slurm tests/slurm`."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.slurm import private_cluster
from tests.slurm.private_cluster import PrivateCluster


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    here = Path(__file__).parent
    for item in items:
        if here in item.path.parents:
            item.add_marker(pytest.mark.slurm)


@pytest.fixture(scope="session")
def slurm() -> Iterator[PrivateCluster]:
    """Two idle nodes; skips, with the reason, where Debian's packages are not and cannot be installed."""
    private_cluster.install()
    reason = private_cluster.why_not()
    if reason is not None:
        pytest.skip(f"needs a SLURM: {reason}")
    # Not in pytest's own folder: its path is too long for a socket, and munge wants no folder that others can write to.
    folder = Path(tempfile.mkdtemp(prefix="slurm-", dir="/tmp"))
    try:
        with PrivateCluster(folder) as cluster:
            yield cluster
    finally:
        shutil.rmtree(folder, ignore_errors=True)
