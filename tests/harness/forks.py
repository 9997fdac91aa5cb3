# SPDX-License-Identifier: Apache-2.0
"""Forks processes from a server that has imported torch, Megatron and NeMo: a rank or a whole command starts in milliseconds.

The server is the standard library's (`multiprocessing`'s "forkserver"), one per pytest process, started at the first use.
Importing takes it about 10 CPU seconds; every process that a test starts in the usual way takes as long.
"""

from __future__ import annotations

import atexit
import importlib
import math
import multiprocessing
import os
import runpy
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import traceback
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from tqdm import tqdm

__all__ = [
    "FORK_SERVER",
    "REFUSE_NEMO",
    "Forked",
    "fork_command",
    "fork_module",
    "fork_on_ranks",
    "fork_program",
    "fork_script",
    "free_port",
    "run_forked",
]

FORK_SERVER = multiprocessing.get_context("forkserver")
FORK_SERVER.set_forkserver_preload(["tests.harness.preloaded"])
REFUSE_NEMO = "REFUSE_NEMO"
"""The environment variable with which the server does not import NeMo."""
may_import_nemo = True
"""Whether processes forked from now on can import NeMo."""
_GRACE_S = 30.0
"""Between the launcher's SIGTERM to the other ranks and its SIGKILL."""


class Forked:
    """A forked process, with the methods of `subprocess.Popen` that tests use.

    Args:
        function: called in the child; returns its exit code. Must be picklable, with its arguments.
        cwd: the child's working directory.
        env: the child's environment, whole.
        stdout: the file that gets standard output, and with `stderr=None` standard error too. Both are appended to.
        stderr: the file that gets standard error.
    """

    def __init__(
        self,
        function: Callable[..., int],
        *args: Any,
        cwd: Path,
        env: Mapping[str, str],
        stdout: Path,
        stderr: Path | None = None,
    ) -> None:
        setting = (str(cwd), dict(env), str(stdout), str(stderr or stdout), not may_import_nemo)
        self._process = FORK_SERVER.Process(target=_child, args=(setting, function, args))
        self._process.start()

    @property
    def pid(self) -> int:
        assert self._process.pid is not None
        return self._process.pid

    def poll(self) -> int | None:
        """Returns the exit code, or None while the process runs; -N if signal N ended it."""
        return self._process.exitcode

    def wait(self, timeout: float) -> int:
        """Waits for the end; returns the exit code.

        Raises:
            subprocess.TimeoutExpired: the process still runs.
        """
        self._process.join(timeout)
        code = self._process.exitcode
        if code is None:
            raise subprocess.TimeoutExpired(f"forked process {self.pid}", timeout)
        return code

    def send_signal(self, number: int) -> None:
        """Sends the signal to the process alone."""
        os.kill(self.pid, number)

    def kill(self) -> None:
        """Kills the process and what it has forked; does nothing if it has ended."""
        if self._process.exitcode is None:
            os.killpg(self.pid, signal.SIGKILL)
        self._process.join()


def run_forked(
    function: Callable[..., int], *args: Any, cwd: Path, env: Mapping[str, str], timeout: float
) -> subprocess.CompletedProcess[str]:
    """Runs `function(*args)` in a forked process; returns its exit code and what it printed.

    Raises:
        subprocess.TimeoutExpired: the process still ran after `timeout` seconds, and was killed.
    """
    with tempfile.TemporaryDirectory() as folder:
        stdout, stderr = Path(folder) / "stdout", Path(folder) / "stderr"
        process = Forked(function, *args, cwd=cwd, env=env, stdout=stdout, stderr=stderr)
        try:
            code = process.wait(timeout)
        finally:
            process.kill()
        printed = [file.read_text(errors="replace") for file in (stdout, stderr)]
    return subprocess.CompletedProcess(args, code, *printed)


def fork_command(argv: Sequence[str]) -> int:
    """`tied-lora` with `argv`. Its ranks, and the commands of quickstart and compare, are forked from this process."""
    from nemo_tied_lora.commands import main
    from nemo_tied_lora.commands.demo import stages
    from nemo_tied_lora.commands.program import run_program
    from nemo_tied_lora.commands.study import commands

    _fork_ranks_instead_of_starting_them()
    constants = {"STDOUT": subprocess.STDOUT, "DEVNULL": subprocess.DEVNULL}
    stages.subprocess = SimpleNamespace(run=_fork_stage, **constants)  # type: ignore[assignment]
    commands.subprocess = SimpleNamespace(Popen=_ForkedRun, **constants)  # type: ignore[assignment]
    run_program(main.main, list(argv))


def fork_module(module: str, argv: Sequence[str]) -> int:
    """`python -m module` with `argv`, for a module whose `main(argv)` returns the exit code."""
    from nemo_tied_lora.commands.program import run_program

    _fork_ranks_instead_of_starting_them()
    main = importlib.import_module(module).main
    if module.startswith("nemo_tied_lora.commands."):
        run_program(main, list(argv), module.rpartition(".")[2].replace("main", ""))
    return int(main(list(argv)) or 0)


def fork_on_ranks(module: str, argv: Sequence[str], num_ranks: int) -> int:
    """`python -m module` with `argv` on ranks; returns 0, or the exit code of the first rank that failed."""
    return _fork_ranks(module, argv, num_ranks)


def fork_script(path: Path, argv: Sequence[str]) -> int:
    """`python path` with `argv`."""
    sys.argv, sys.path[0:0] = [str(path), *argv], [str(path.parent)]
    runpy.run_path(str(path), run_name="__main__")
    return 0


def fork_program(code: str) -> int:
    """`python -c code`."""
    exec(code, {"__name__": "__main__"})
    return 0


def free_port() -> int:
    """Returns a port that nobody listens on."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


def _child(
    setting: tuple[str, dict[str, str], str, str, bool], function: Callable[..., int], args: tuple[Any, ...]
) -> None:
    """Makes this forked process look like one that was started in the usual way, and runs the function."""
    cwd, env, stdout, stderr, refuse_nemo = setting
    os.setpgid(0, 0)
    for number, path in ((1, stdout), (2, stderr)):
        file = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
        os.dup2(file, number)
        os.close(file)
    os.environ.clear()
    os.environ.update(env)
    os.chdir(cwd)
    sys.argv = ["tied-lora"]
    warnings.simplefilter("ignore")
    if refuse_nemo:
        _forget_nemo()
    _run_sitecustomize()
    _exit(function, *args)


def _forget_nemo() -> None:
    for name in [name for name in sys.modules if f"{name}.".startswith(("nemo.", "nemo_tied_lora.nemo."))]:
        del sys.modules[name]
    sys.modules["nemo"] = None  # type: ignore[assignment]


def _run_sitecustomize() -> None:
    """As Python does at its start: tests plant faults with it."""
    for folder in os.environ.get("PYTHONPATH", "").split(os.pathsep):
        planted = Path(folder) / "sitecustomize.py"
        if folder and planted.exists():
            runpy.run_path(str(planted))


def _exit(function: Callable[..., int], *args: Any) -> None:
    """Ends this process with the function's exit code, as the interpreter does: exit handlers, then the flushes."""
    tqdm.set_lock(threading.RLock())  # another thread of the parent may have held the old one
    try:
        code = function(*args)
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
        if isinstance(end.code, str):
            print(end.code, file=sys.stderr)
    except BaseException:
        traceback.print_exc()
        code = 1
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _fork_ranks_instead_of_starting_them() -> None:
    from nemo_tied_lora.launching import local_ranks

    original = local_ranks.start_ranks
    for module in list(sys.modules.values()):
        if (
            getattr(module, "__name__", "").startswith("nemo_tied_lora")
            and vars(module).get("start_ranks") is original
        ):
            module.start_ranks = _fork_ranks  # type: ignore[attr-defined]


def _fork_stage(
    command: Sequence[str],
    *,
    check: bool,
    env: Mapping[str, str],
    stdout: Any = None,
    stderr: Any = None,
    close_fds: bool = True,
) -> subprocess.CompletedProcess[str]:
    """`subprocess.run` of `python -m module arguments`, with this process's imports. A fork keeps all descriptors."""
    _python, _m, module, *arguments = command
    sys.stdout.flush()
    sys.stderr.flush()
    pid = os.fork()
    if pid == 0:
        os.environ.clear()
        os.environ.update(env)
        if stdout is not None:
            os.dup2(stdout.fileno(), 1)
            os.dup2(1, 2)
        _exit(fork_module, module, arguments)
    return subprocess.CompletedProcess(command, os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))


class _ForkedRun:
    """`subprocess.Popen` of a run of a study, with this process's imports. It has ended when it has begun."""

    def __init__(
        self, command: Sequence[str], *, env: Mapping[str, str], stdout: Any, stderr: Any, **options: Any
    ) -> None:
        self._done = _fork_stage(command, check=False, env=env, stdout=stdout, stderr=stderr)

    def wait(self) -> int:
        """Its exit code."""
        return self._done.returncode


def _fork_ranks(module: str, arguments: Sequence[str], num_ranks: int) -> int:
    """`start_ranks`, which starts new processes, with forks of this one instead. Returns 0, or the code of the first failure."""
    from nemo_tied_lora.launching.local_ranks import exit_code, rank_variables
    from nemo_tied_lora.planning.rank_variables import FAILURE_PIPE

    sys.stdout.flush()
    sys.stderr.flush()
    port = free_port()
    variables = [rank_variables(rank, num_ranks, port) for rank in range(num_ranks)]
    told, tell = os.pipe()
    ranks = []
    for rank in range(num_ranks):
        pid = os.fork()
        if pid == 0:
            os.environ.update({**variables[rank], FAILURE_PIPE: str(told)})
            _exit(fork_module, module, arguments)
        ranks.append(pid)
    failed, deadline = 0, math.inf
    while ranks:
        ended = [(pid, status) for pid, status in (os.waitpid(rank, os.WNOHANG) for rank in ranks) if pid != 0]
        # Two can end in one turn: none of them gets a signal.
        ranks = [rank for rank in ranks if rank not in dict(ended)]
        for _, status in ended:
            if os.waitstatus_to_exitcode(status) != 0 and not failed:
                failed = exit_code(os.waitstatus_to_exitcode(status))
                deadline = time.monotonic() + _GRACE_S
                os.write(tell, b"!" * len(ranks))
                _send(signal.SIGTERM, ranks)
        time.sleep(0.01)
        if time.monotonic() > deadline:
            _send(signal.SIGKILL, ranks)
    os.close(told)
    os.close(tell)
    return failed


def _send(number: int, ranks: Sequence[int]) -> None:
    for pid in ranks:
        os.kill(pid, number)
