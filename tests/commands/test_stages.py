# SPDX-License-Identifier: Apache-2.0
"""Two processes without torch: a stage of the quickstart ends when the quickstart is killed, and claims its folder until then."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from nemo_tied_lora.commands.study.claims import is_claimed
from tests.harness.paths import ROOT

_STAGE = """
import os, signal, sys, time
from pathlib import Path
from nemo_tied_lora.launching.local_ranks import follow_launcher
follow_launcher()
def save(number, frame):
    time.sleep(1)
    sys.exit(0)
signal.signal(signal.SIGTERM, save)
Path(sys.argv[1]).write_text(str(os.getpid()))
time.sleep(60)
"""
_QUICKSTART = """
import os, sys
from pathlib import Path
from nemo_tied_lora.commands.demo import stages
from nemo_tied_lora.commands.study.claims import claim
with claim(Path(sys.argv[2]).parent) as claimed:
    os.set_inheritable(claimed, True)
    stages._run([sys.executable, *sys.argv[1:]])
"""


def test_a_stage_saves_and_ends_when_its_quickstart_is_killed_and_claims_the_folder_until_then(tmp_path: Path) -> None:
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
    assert is_claimed(tmp_path)
    while _lives(int(mark.read_text())):
        assert time.monotonic() < deadline, "the stage still runs"
        time.sleep(0.02)
    assert not is_claimed(tmp_path)


def _lives(process: int) -> bool:
    """Whether a process runs. One that has ended may wait for its parent to ask."""
    try:
        return "\nState:\tZ" not in Path("/proc", str(process), "status").read_text()
    except OSError:
        return False
