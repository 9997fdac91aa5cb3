# SPDX-License-Identifier: Apache-2.0
"""Stops in a real run's ranks, so that a test can disturb it at a step it chose, however slow the machine is.

The ranks import `PLANT` as `sitecustomize`. A gate is a folder: while `$GATES/5` exists, each rank waits after its fifth
step; while `$GATES/save-8` exists, rank 0 waits in the middle of writing the checkpoint of step 8. A rank that waits leaves
a file with its process number, and another once it has been told to stop.
"""

from __future__ import annotations

from pathlib import Path

__all__ = ["PLANT", "Gate"]

PLANT = """
import os, sys, threading, time
from pathlib import Path

GATES, RANK, fsync = Path(os.environ["GATES"]), os.environ.get("RANK"), os.fsync
ranks = []  # the `Rank` of this process, from its first step on


def wait_at(gate):
    try:
        (gate / f".{RANK}").write_text(str(os.getpid()))
        (gate / f".{RANK}").rename(gate / f"rank-{RANK}")
        while gate.is_dir():
            if ranks and ranks[0].asked_to_stop:
                (gate / f"asked-{RANK}").touch()
            time.sleep(0.05)
    except FileNotFoundError:  # opened in between
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
    """One place where the ranks wait until it is opened; closed when it is made."""

    def __init__(self, folder: Path, name: str | int) -> None:
        self._path = folder / str(name)
        self._path.mkdir(parents=True)

    def process(self, rank: int) -> int:
        """The number of the rank's process that waits here."""
        return int((self._path / f"rank-{rank}").read_text())

    def reached_by(self, *ranks: int) -> bool:
        """Whether these ranks wait here."""
        return all((self._path / f"rank-{rank}").exists() for rank in ranks)

    def asked(self, *ranks: int) -> bool:
        """Whether these ranks, while they wait, have been told to stop."""
        return all((self._path / f"asked-{rank}").exists() for rank in ranks)

    def open(self) -> None:
        """Lets everybody through, now and later."""
        self._path.rename(self._path.with_name(f".passed-{self._path.name}"))
