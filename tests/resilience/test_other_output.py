# SPDX-License-Identifier: Apache-2.0
"""With verbose=false a rank shows this package's lines and the progress bar; all other output is in a file. Small processes."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.harness.paths import ROOT

# A module of ours, a module of NeMo's and Lightning's bar: what counts is the name of the module that writes.
PROGRAM = """
import logging, os, subprocess, sys, warnings
from pathlib import Path
from nemo_tied_lora.resilience.other_output import OtherOutput

def run_as(module, code):
    exec(compile(code, module, "exec"), {"__name__": module, "os": os, "sys": sys})

other = OtherOutput("finetune-rank-0", wanted=sys.argv[1] == "quiet")
if sys.argv[2]:
    other.keep_in(Path(sys.argv[2]))
run_as("nemo_tied_lora.nemo.training_runs", "print('our line'); print('our error', file=sys.stderr)")
run_as("nemo_tied_lora.progress", "from tqdm import tqdm; list(tqdm([1], desc='our bar'))")
run_as("lightning.pytorch.callbacks.progress.tqdm_progress", "from tqdm import tqdm; list(tqdm([1], desc='training bar'))")
run_as("nemo.collections.nlp.data", "print('data of NeMo')")
run_as("nemo.collections.nlp.data", "from tqdm import tqdm; list(tqdm([1], desc='bar of NeMo'))")
run_as("nemo.utils", "sys.stdout.buffer.write(b'bytes of NeMo')")
run_as("nemo.utils", "import subprocess; subprocess.run(['echo', 'child of NeMo'], stdout=sys.stdout)")
run_as("lightning.pytorch.utilities", "import logging; logging.getLogger('lightning').error('message of Lightning')")
run_as("torch.serialization", "import warnings; warnings.warn('warning of torch')")
os.write(1, b"line of C++\\n")
os.write(2, b"error of C++\\n")
subprocess.run(["echo", "line of make"])
subprocess.run([sys.executable, "-c", "print('line of a worker')"])
other.end(keep=sys.argv[3] == "keep")
print("after the end")
print(other.path, file=sys.stderr)
"""
OURS = ("our line", "after the end")
OUR_ERRORS = ("our error", "our bar", "training bar")
OTHERS = (
    *("data of NeMo", "bar of NeMo", "bytes of NeMo", "child of NeMo", "message of Lightning", "warning of torch"),
    *("line of C++", "error of C++", "line of make", "line of a worker"),
)


def run(verbosity: str, folder: str = "", keep: str = "", **variables: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), **variables}
    command = [sys.executable, "-c", PROGRAM, verbosity, folder, keep]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 0, done.stderr
    return done


def test_only_our_lines_and_the_training_bar_are_shown(tmp_path: Path) -> None:
    done = run("quiet", str(tmp_path))
    assert done.stdout.splitlines() == list(OURS)
    assert all(text in done.stderr for text in OUR_ERRORS)
    assert not [text for text in OTHERS if text in done.stderr]
    kept = (tmp_path / "finetune-rank-0.log").read_text()
    assert sorted(text for text in (*OURS, *OUR_ERRORS, *OTHERS) if text in kept) == sorted(OTHERS)
    assert done.stderr.splitlines()[-1] == str(tmp_path / "finetune-rank-0.log")


def test_verbose_shows_everything_and_makes_no_file(tmp_path: Path) -> None:
    done = run("verbose", str(tmp_path), TMPDIR=str(tmp_path))
    assert all(text in done.stdout + done.stderr for text in (*OURS, *OUR_ERRORS, *OTHERS))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("keep", "remain"), [("keep", 1), ("", 0)])
def test_without_a_run_folder_the_file_is_temporary_and_stays_only_after_a_failure(
    keep: str, remain: int, tmp_path: Path
) -> None:
    run("quiet", keep=keep, TMPDIR=str(tmp_path))
    assert len(list(tmp_path.glob("tied-lora-finetune-rank-0-*.log"))) == remain


def test_who_asks_for_the_messages_of_nccl_sees_them(tmp_path: Path) -> None:
    done = run("quiet", str(tmp_path), NCCL_DEBUG="INFO")
    assert "line of C++" in done.stdout
    assert not re.search("NeMo|Lightning", done.stdout)
