# SPDX-License-Identifier: Apache-2.0
"""One process: temporary folders beside a target, and the room on a disk."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from nemo_tied_lora.files import folder_beside, room_problem

_HOLD = """
import sys, time
from pathlib import Path
from nemo_tied_lora.files import folder_beside
with folder_beside(Path(sys.argv[1])) as folder:
    (folder / "large").write_bytes(bytes(1000))
    print("ready", flush=True)
    time.sleep(100)
"""


def test_a_killed_writers_folder_is_removed_and_a_living_ones_stays(tmp_path: Path) -> None:
    target = tmp_path / "base.nemo"
    process = subprocess.Popen([sys.executable, "-c", _HOLD, str(target)], stdout=subprocess.PIPE)
    assert process.stdout is not None
    process.stdout.readline()
    (held,) = tmp_path.iterdir()
    long_ago = time.time() - 100
    os.utime(held, (long_ago, long_ago))
    with folder_beside(target) as mine:
        assert sorted(tmp_path.iterdir()) == sorted([held, mine])
    process.send_signal(signal.SIGKILL)
    process.wait()
    with folder_beside(target) as mine:
        assert list(tmp_path.iterdir()) == [mine]
    assert list(tmp_path.iterdir()) == []


def test_what_is_missing_on_a_disk_is_counted_from_its_first_existing_folder(tmp_path: Path) -> None:
    assert room_problem(tmp_path / "new" / "x.nemo", 1) is None
    problem = room_problem(tmp_path / "new" / "x.nemo", 10**18)
    assert problem is not None
    assert problem.startswith(f"no room on the disk of {tmp_path}: 1000000000.0 GB are needed, ")
