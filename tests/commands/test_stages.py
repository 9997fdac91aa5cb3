# SPDX-License-Identifier: Apache-2.0
"""Two processes without torch: a stage of the quickstart ends when the quickstart is killed."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from tests.harness.paths import ROOT

_STAGE = """
import os, sys, time
from pathlib import Path
from nemo_tied_lora.launching.local_ranks import follow_launcher
follow_launcher()
Path(sys.argv[1]).write_text(str(os.getpid()))
time.sleep(60)
"""
_QUICKSTART = """
import sys
from nemo_tied_lora.commands.demo import stages
stages._run([sys.executable, *sys.argv[1:]], None)
"""


def test_a_stage_ends_when_its_quickstart_is_killed(tmp_path: Path) -> None:
    (tmp_path / "stage.py").write_text(_STAGE)
    mark = tmp_path / "mark"
    command = [sys.executable, "-c", _QUICKSTART, str(tmp_path / "stage.py"), str(mark)]
    quickstart = subprocess.Popen(command, env={**os.environ, "PYTHONPATH": str(ROOT)})
    deadline = time.monotonic() + 30
    while not (mark.exists() and mark.read_text()):
        assert time.monotonic() < deadline
        time.sleep(0.02)
    quickstart.send_signal(signal.SIGKILL)
    quickstart.wait()
    while _lives(int(mark.read_text())):
        assert time.monotonic() < deadline, "the stage still runs"
        time.sleep(0.02)


def _lives(process: int) -> bool:
    """Whether a process runs. One that has ended may wait for its parent to ask."""
    try:
        return "\nState:\tZ" not in Path("/proc", str(process), "status").read_text()
    except OSError:
        return False
