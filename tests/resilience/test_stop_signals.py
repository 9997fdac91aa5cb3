# SPDX-License-Identifier: Apache-2.0
"""Stop signals reach the run's handler, and end processes that libraries fork. Pure Python."""

from __future__ import annotations

import os
import signal
import subprocess
import sys

import pytest

from nemo_tied_lora.resilience.stop_signals import STOP_SIGNALS, answered_by
from tests.harness.paths import ROOT

# Each pool ends right after its start, before its workers are set up. Without the guard, one in some tens never ends.
POOLS = """
import multiprocessing, signal, sys
from nemo_tied_lora.resilience import stop_signals
got = []
with stop_signals.answered_by(lambda number, frame: got.append(number)):
    for _ in range(150):
        with multiprocessing.get_context("fork").Pool(2):
            pass
assert not got, got
"""


@pytest.mark.parametrize("number", STOP_SIGNALS)
def test_the_handler_is_called_and_the_old_one_is_restored(number: int) -> None:
    before, got = signal.getsignal(number), []
    with answered_by(lambda n, frame: got.append(n)):
        os.kill(os.getpid(), number)
    assert got == [number]
    assert signal.getsignal(number) is before


@pytest.mark.parametrize("number", STOP_SIGNALS)
def test_a_signal_does_not_change_a_decided_exit_code(number: int) -> None:
    script = f"""
import os, sys
from nemo_tied_lora.resilience.stop_signals import answered_by, ignore_from_now
with answered_by(lambda number, frame: sys.exit(75)):
    ignore_from_now()
    os.kill(os.getpid(), {int(number)})
os.kill(os.getpid(), {int(number)})
sys.exit(2)
"""
    root = str(ROOT)
    ended = subprocess.run([sys.executable, "-c", script], check=False, env={**os.environ, "PYTHONPATH": root})
    assert ended.returncode == 2


@pytest.mark.parametrize("number", STOP_SIGNALS)
def test_a_forked_process_dies_of_the_signal_and_blocks_no_signal(number: int) -> None:
    got: list[int] = []
    with answered_by(lambda n, frame: got.append(n)):
        reader, writer = os.pipe()
        pid = os.fork()
        if pid == 0:
            os.write(writer, b"1")
            signal.pause()
            os._exit(0)
        os.read(reader, 1)
        os.kill(pid, number)
        assert os.waitpid(pid, 0)[1] == number
    assert got == []
    assert signal.pthread_sigmask(signal.SIG_BLOCK, []) == set()


def test_pools_of_forked_workers_end() -> None:
    root = str(ROOT)
    subprocess.run([sys.executable, "-c", POOLS], check=True, timeout=120, env={**os.environ, "PYTHONPATH": root})
