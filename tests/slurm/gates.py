# SPDX-License-Identifier: Apache-2.0
"""Makes the ranks of a real run wait, so that a test can disturb it at a chosen step on a machine of any speed.

The ranks import `PLANT` as `sitecustomize`. A gate is a folder. While `$GATES/5` exists, each rank waits after its fifth
step. While `$GATES/save-8` exists, rank 0 waits in the middle of writing the checkpoint of step 8. A waiting rank writes
a file with its process id into the folder, and another file when it receives the request to stop.
"""

from __future__ import annotations

from pathlib import Path

__all__ = ["PLANT", "Gate"]

PLANT = """
import os, sys, threading, time
from pathlib import Path

GATES, RANK, fsync = Path(os.environ["GATES"]), os.environ.get("RANK"), os.fsync
ranks = []  # the `Rank` of this process, after its first step


def wait_at(gate):
    try:
        (gate / f".{RANK}").write_text(str(os.getpid()))
        (gate / f".{RANK}").rename(gate / f"rank-{RANK}")
        while gate.is_dir():
            if ranks and ranks[0].asked_to_stop:
                (gate / f"asked-{RANK}").touch()
            time.sleep(0.05)
    except FileNotFoundError:  # the gate was opened meanwhile
        pass


def waiting_fsync(handle):
    path = os.readlink(f"/proc/self/fd/{handle}")
    for gate in GATES.glob("save-*") if "linear_proj.safetensors" in path else ():
        if f"-step={gate.name.removeprefix('save-')}-" in path:
            wait_at(gate)
    fsync(handle)


def plant():
    while not hasattr(sys.modules.get("nemo_tied_lora.nemo.status_callback"), "StatusCallback"):
        time.sleep(0.05)
    callback = sys.modules["nemo_tied_lora.nemo.status_callback"].StatusCallback
    step_ended = callback.on_train_batch_end

    def on_train_batch_end(self, trainer, *arguments):
        ranks[:] = [self._rank]
        step_ended(self, trainer, *arguments)
        wait_at(GATES / str(trainer.global_step))

    callback.on_train_batch_end = on_train_batch_end


if RANK is not None:
    os.fsync = waiting_fsync
    threading.Thread(target=plant, daemon=True).start()
"""


class Gate:
    """A place where the ranks wait until it is opened. It starts closed."""

    def __init__(self, folder: Path, name: str | int) -> None:
        self._path = folder / str(name)
        self._path.mkdir(parents=True)

    def process(self, rank: int) -> int:
        """Returns the process id of the rank, which waits at this gate."""
        return int((self._path / f"rank-{rank}").read_text())

    def reached_by(self, *ranks: int) -> bool:
        """Returns whether these ranks have reached this gate."""
        return all((self._path / f"rank-{rank}").exists() for rank in ranks)

    def asked(self, *ranks: int) -> bool:
        """Returns whether these ranks have received the request to stop while they wait."""
        return all((self._path / f"asked-{rank}").exists() for rank in ranks)

    def open(self) -> None:
        """Lets all ranks through, now and later."""
        self._path.rename(self._path.with_name(f".passed-{self._path.name}"))
