# SPDX-License-Identifier: Apache-2.0
"""The private SLURM leaves no process and no file behind, however the tests end."""

from __future__ import annotations

import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from tests.harness.paths import ROOT
from tests.slurm.private_cluster import PrivateCluster
from tests.slurm.remains import processes

# Files that Debian's packages of SLURM and munge would write if their services were started.
SYSTEM = [
    "/etc/slurm",
    "/etc/munge",
    "/var/lib/slurm",
    "/var/spool/slurm*",
    "/var/log/slurm",
    "/var/log/munge",
    "/run/munge",
]
_HELD = """
import sys
from pathlib import Path
from tests.slurm.private_cluster import PrivateCluster
with PrivateCluster(Path(sys.argv[1])) as cluster:
    print(cluster.run("sbatch", "--parsable", "--nodes=2", "--output=/dev/null", "--wrap=srun sleep 600"), flush=True)
    sys.stdin.read()
"""


def system_files() -> list[tuple[str, float]]:
    found = [path for place in SYSTEM for top in Path("/").glob(place[1:]) for path in [top, *top.rglob("*")]]
    return sorted((str(path), path.lstat().st_mtime) for path in found)


def test_no_process_and_no_file_is_left_if_the_tests_are_killed_while_a_job_runs(slurm: PrivateCluster) -> None:
    before = system_files()
    folder = Path(tempfile.mkdtemp(prefix="slurm-", dir="/tmp"))
    command = [sys.executable, "-c", _HELD, str(folder)]
    holder = subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    try:
        assert holder.stdout is not None
        assert holder.stdout.readline().strip() == b"1"
        other = PrivateCluster(folder)
        other.wait_until(lambda: "sleep" in names(folder), 60, "the job's step")
        assert {"munged", "slurmctld", "slurmd", "slurmstepd", "srun"} <= names(folder)
    finally:
        holder.send_signal(signal.SIGKILL)
        holder.wait()
    slurm.wait_until(lambda: not folder.exists() and not processes(folder), 60, "the end of all its processes")
    assert system_files() == before
    assert slurm.run("sinfo", "--noheader", "--format=%D").strip() == "2"  # the other SLURM is not disturbed


def names(folder: Path) -> set[str]:
    """Names of the programs that run now."""
    found = set()
    for process in processes(folder):
        try:
            found.add((Path("/proc") / str(process) / "comm").read_text().strip().partition(":")[0])
        except OSError:
            time.sleep(0)
    return found
