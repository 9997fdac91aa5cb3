# SPDX-License-Identifier: Apache-2.0
"""Signals that stop a run reach its handler, and end what libraries fork from it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys

import pytest

from nemo_tied_lora.resilience.stop_signals import STOP_SIGNALS, answered_by
from tests.harness.paths import ROOT

# Pools are ended right after they begin, when workers are not set up: one in some tens used to live for ever.
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
def test_the_handler_is_called_here_and_the_old_one_is_back_afterwards(number: int) -> None:
    before, got = signal.getsignal(number), []
    with answered_by(lambda n, frame: got.append(n)):
        os.kill(os.getpid(), number)
    assert got == [number]
    assert signal.getsignal(number) is before


@pytest.mark.parametrize("number", STOP_SIGNALS)
def test_once_the_exit_code_is_settled_no_signal_changes_it(number: int) -> None:
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
def test_a_forked_process_dies_of_the_signal_and_blocks_nothing(number: int) -> None:
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
