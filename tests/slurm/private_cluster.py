# SPDX-License-Identifier: Apache-2.0
"""Starts a private SLURM on this machine: munged, slurmctld and two slurmd, with one folder, one key and free ports.

It writes nothing outside the folder and reads nothing in /etc, so it does not disturb another SLURM on this machine.
"""

from __future__ import annotations

import contextlib
import os
import re
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from tests.harness.paths import ROOT
from tests.slurm.remains import processes

__all__ = ["PrivateCluster", "install", "why_not"]

PACKAGES = ("slurm-wlm", "munge", "shellcheck")
_PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scontrol", "squeue", "scancel", "sinfo", "shellcheck")
_ENDED = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY", "BOOT_FAIL")


def why_not() -> str | None:
    """Returns why a SLURM cannot run on this machine, or None if it can. Call `install` first."""
    if os.name != "posix" or not Path("/proc/self").exists():
        return "the system is not Linux"
    missing = [program for program in _PROGRAMS if _which(program) is None]
    if missing:
        return (
            f"{', '.join(missing)} cannot be found: apt-get install {' '.join(PACKAGES)}, as root, on Debian or Ubuntu"
        )
    return "slurmctld and slurmd need root" if os.geteuid() != 0 else None


def install() -> None:
    """Installs Debian's packages, without starting their services, if programs are missing and this process may install."""
    if all(_which(program) for program in _PROGRAMS) or os.geteuid() != 0 or shutil.which("apt-get") is None:
        return
    # With RUNLEVEL=1 the packages' scripts start no services.
    environment = {**os.environ, "DEBIAN_FRONTEND": "noninteractive", "RUNLEVEL": "1"}
    for command in (["update"], ["install", "--yes", "--no-install-recommends", *PACKAGES]):
        subprocess.run(
            ["apt-get", "--quiet", *command], env=environment, check=False, capture_output=True, timeout=600
        )


def _which(program: str) -> str | None:
    return shutil.which(program, path=f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin")


class PrivateCluster:
    """A context manager that runs a SLURM with two nodes, n1 and n2, on the loopback interface.

    Args:
        folder: holds all files. Its path must be short, for sockets, and others must not be able to write to it, for munge.
    """

    def __init__(self, folder: Path, first_job: int = 1) -> None:
        self.folder, self._first_job = folder, first_job
        self._daemons: list[subprocess.Popen[bytes]] = []
        self._remains: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> PrivateCluster:
        try:
            self._start()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *exception: object) -> None:
        if len(self._daemons) > 1:
            self.run("scancel", "--user=root", check=False)
            self._wait(lambda: not self.run("squeue", "--noheader", check=False), 20, "jobs to end", fail=False)
        for daemon in reversed(self._daemons):
            daemon.terminate()
        for daemon in reversed(self._daemons):
            try:
                daemon.wait(20)
            except subprocess.TimeoutExpired:
                daemon.kill()
                daemon.wait()
        self._daemons.clear()
        if self._remains is not None:
            self._remains.communicate()

    @property
    def environment(self) -> dict[str, str]:
        """The environment in which SLURM's commands use this SLURM and no other."""
        clean = {name: value for name, value in os.environ.items() if not re.match(r"SLURM|SBATCH|SRUN", name)}
        return {**clean, "SLURM_CONF": str(self.folder / "slurm.conf")}

    def run(self, *command: str, check: bool = True, cwd: Path | None = None, **variables: str) -> str:
        """Runs a command of SLURM and returns its output.

        Raises:
            AssertionError: `check` is set and the command failed. The message has its output.
        """
        environment = {**self.environment, **variables}
        done = subprocess.run(
            command, env=environment, cwd=cwd or self.folder, capture_output=True, text=True, timeout=120, check=False
        )
        assert done.returncode == 0 or not check, f"{command}\n{done.stdout}\n{done.stderr}"
        return done.stdout.strip()

    def fields(self, job: str) -> dict[str, str]:
        """Returns the fields that `scontrol show job` prints for a job, or for the task `ARRAY_TASK` of an array."""
        return dict(re.findall(r"(\w+(?:/\w+)?)=(\S*)", self.run("scontrol", "--oneliner", "show", "job", job)))

    def wait_for_state(self, job: str, *states: str, seconds: float = 120) -> dict[str, str]:
        """Waits until the job is in one of the states, or has ended if none is given. Returns its fields."""
        found: dict[str, str] = {}

        def reached() -> bool:
            found.update(self.fields(job))
            return found["JobState"] in (states or _ENDED)

        self._wait(reached, seconds, f"job {job}", lambda: f"{found}")
        return found

    def wait_until(self, condition: Callable[[], bool], seconds: float, what: str) -> None:
        """Polls the condition. After `seconds` it fails with a message that names `what`, and SLURM's view of it."""
        self._wait(condition, seconds, what, self._state)

    def start_node(self, name: str) -> None:
        """Starts the node's slurmd, which registers with the controller."""
        self._daemon("slurmd", "-D", "-N", name, "-f", str(self.folder / "slurm.conf"))

    def kill_node(self, name: str) -> None:
        """Kills the node's slurmd, its job steps and their processes at once, like a power cut."""
        [slurmd] = [daemon for daemon in self._daemons if isinstance(daemon.args, list) and name in daemon.args]
        slurmd.kill()
        slurmd.wait()
        self._daemons.remove(slurmd)
        for process in processes(self.folder, name):
            with contextlib.suppress(ProcessLookupError):
                os.kill(process, signal.SIGKILL)

    def _start(self) -> None:
        # In a separate session, so that Ctrl-C or a kill of this one does not end it.
        self._remains = subprocess.Popen(
            [sys.executable, "-m", "tests.slurm.remains", str(self.folder)],
            stdin=subprocess.PIPE,
            cwd=ROOT,
            start_new_session=True,
        )
        for name in ("munge", "state", "spool-n1", "spool-n2", "logs"):
            (self.folder / name).mkdir(mode=0o755, parents=True)
        key = self.folder / "munge" / "key"
        key.write_bytes(secrets.token_bytes(128))
        key.chmod(0o600)
        munge = [f"--{what}={self.folder / 'munge' / what.removesuffix('-file')}" for what in ("key-file", "socket")]
        munge += [f"--{what}={self.folder / 'munge' / what}" for what in ("pid-file", "seed-file", "log-file")]
        self._daemon("munged", "--foreground", "--force", *munge)
        self._wait((self.folder / "munge" / "socket").exists, 20, "munged")
        (self.folder / "slurm.conf").write_text(self._configuration())
        self._daemon("slurmctld", "-D", "-f", str(self.folder / "slurm.conf"))
        for node in ("n1", "n2"):
            self.start_node(node)
        idle = ["sinfo", "--noheader", "--Node", "--states=idle", "--format=%N"]
        self._wait(lambda: self.run(*idle, check=False).split() == ["n1", "n2"], 60, "two idle nodes", self._log_ends)

    def _daemon(self, program: str, *arguments: str) -> None:
        path = _which(program)
        assert path is not None, program
        with (self.folder / "logs" / f"{program}-{len(self._daemons)}.log").open("wb") as log:
            self._daemons.append(
                subprocess.Popen([path, *arguments], stdout=log, stderr=log, env=self.environment, cwd=self.folder)
            )

    def _state(self) -> str:
        return "\n".join([self.run("scontrol", "show", "job", check=False), self._log_ends()])

    def _log_ends(self) -> str:
        logs = sorted((self.folder / "logs").glob("*.log"))
        return "\n".join(f"{log.name}: {log.read_text(errors='replace')[-1500:]}" for log in logs)

    def _configuration(self) -> str:
        host = socket.gethostname().split(".")[0]
        control, first, second = _free_ports(3)
        node = f"NodeHostname={host} NodeAddr=127.0.0.1 CPUs=8 RealMemory=4096 State=UNKNOWN"
        return _CONFIGURATION.format(
            folder=self.folder,
            first_job=self._first_job,
            host=host,
            control=control,
            node=node,
            first=first,
            second=second,
        )

    @staticmethod
    def _wait(
        condition: Callable[[], bool],
        seconds: float,
        what: str,
        details: Callable[[], str] = str,
        *,
        fail: bool = True,
    ) -> None:
        end = time.monotonic() + seconds
        while not condition():
            if time.monotonic() > end:
                assert not fail, f"waited {seconds} s for {what}: {details()}"
                return
            time.sleep(0.3)


# cred_expire is also the time that a requeued job waits before it starts again; the default is 120 s.
# Two slurmd on one host share its name, so every path contains %n, the name of the node.
# MessageTimeout: slurmctld sends a message again that it believes to be lost. On a busy machine a late order to end a step
# could then end the same step after the job's restart.
_CONFIGURATION = """\
ClusterName=private
FirstJobId={first_job}
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={control}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge/socket,cred_expire=5
CryptoType=crypto/munge
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
SwitchType=switch/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SchedulerType=sched/backfill
SchedulerParameters=batch_sched_delay=0,sched_interval=2,bf_interval=2,sched_min_interval=0
ReturnToService=2
SlurmdTimeout=120
MessageTimeout=60
KillWait=60
MinJobAge=36000
InactiveLimit=0
Waittime=0
MailProg=/bin/true
SlurmdParameters=config_overrides
PlugStackConfig={folder}/plugstack.conf
NodeName=n1 Port={first} {node}
NodeName=n2 Port={second} {node}
PartitionName=all Nodes=n1,n2 Default=YES MaxTime=INFINITE State=UP
"""


def _free_ports(count: int) -> list[int]:
    sockets = [socket.socket() for _ in range(count)]
    try:
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]
    finally:
        for each in sockets:
            each.close()
