# SPDX-License-Identifier: Apache-2.0
"""How a command ends as a program: an exit code, and at most one line on stderr. Small real processes without torch."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from nemo_tied_lora.commands import compare, main, merge
from nemo_tied_lora.resilience.unforeseen import describe
from tests.harness.paths import ROOT

PROGRAM = """
import os, signal, sys
from nemo_tied_lora.commands.program import run_program

class OutOfMemoryError(RuntimeError): ...

def fill():
    while True:
        print("x" * 1000)

def write(path):
    number = os.open(path, os.O_WRONLY | os.O_CREAT)
    os.write(number, str(number).encode())
    print("lost")

def main(argv):
    exec(argv[1])
    return 0

signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background ignores it
run_program(main, ["merge", sys.argv[1]])
"""


def program(code: str, shell: str = "", **variables: str) -> subprocess.CompletedProcess[str]:
    """Runs the code inside a command. `shell` is what a user types behind the command, such as "| head -1"."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHON": sys.executable, "PROGRAM": PROGRAM, "CODE": code}
    line = f'"$PYTHON" -c "$PROGRAM" "$CODE" {shell}; exit ${{PIPESTATUS[0]}}'
    return subprocess.run(
        ["bash", "-c", line],
        env={**environment, **variables},
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )


@pytest.mark.parametrize(
    ("code", "shell", "ends"),
    [
        ("fill()", "| head -1 > /dev/null", 141),
        ("print('a'); print('b')", "| true", 141),
        ("print('a', flush=True)", "| { exec <&-; sleep 0.5; }", 141),
        ("fill()", "2>&1 | head -1 > /dev/null", 141),
        ("print('a')", ">&-", 0),
        ("print('a', file=sys.stderr)", "2>&-", 0),
        ("print('a', file=sys.stderr); print('a')", ">&- 2>&- <&-", 0),
        ("os.kill(os.getpid(), signal.SIGINT); signal.pause()", "", 130),
        ("sys.exit(75)", "", 75),
    ],
)
def test_a_closed_pipe_or_stream_and_ctrl_c_end_without_a_word(code: str, shell: str, ends: int) -> None:
    done = program(code, shell)
    assert (done.returncode, done.stderr) == (ends, "")


def test_processes_that_share_a_log_do_not_write_into_each_others_lines() -> None:
    many = "for _ in range(300): print('a' * 50)"
    shared = '& "$PYTHON" -c "$PROGRAM" "$CODE"; wait'
    lines = program(many, shared).stdout.splitlines()
    assert lines == ["a" * 50] * 600


def test_a_file_does_not_take_the_number_of_a_closed_stream(tmp_path: Path) -> None:
    """Without this, what is printed would be written into the file."""
    done = program(f"write({str(tmp_path / 'file')!r})", ">&- 2>&-")
    assert done.returncode == 0
    assert int((tmp_path / "file").read_text()) > 2


@pytest.mark.parametrize("code", ["print('a')", "print('a', flush=True)", "fill()"])
def test_a_full_disk_is_one_line(code: str) -> None:
    done = program(code, "> /dev/full")
    assert done.returncode == 1
    assert done.stderr == (
        "tied-lora merge: standard output cannot be written: No space left on device; free some space\n"
    )


@pytest.mark.parametrize(
    ("code", "line"),
    [
        ("{}['layer']", "KeyError: 'layer'"),
        ("raise RuntimeError('first\\nsecond')", "RuntimeError: first"),
        ("raise RuntimeError('sizes differ:\\n  a is 3\\n  b is 4')", "RuntimeError: sizes differ: a is 3"),
        ("raise AssertionError", "AssertionError"),
        ("raise BaseException('not an Exception')", "BaseException: not an Exception"),
        (
            "error = BaseException(); error.failures = {0: (ValueError('shapes differ'), None)}; raise error",
            "ValueError: shapes differ; the traceback",
        ),
        ("open('/nowhere')", "FileNotFoundError: [Errno 2] No such file or directory: '/nowhere'"),
        ("open('/dev/full', 'w').write('x' * 10**6)", "OSError: [Errno 28] No space left on device"),
        ("raise MemoryError", "MemoryError; out of memory: use a machine with more memory; verify=false needs less"),
        (
            "raise OutOfMemoryError('CUDA out of memory. Tried to allocate 2 GiB')",
            "OutOfMemoryError: CUDA out of memory. Tried to allocate 2 GiB; out of memory: use a machine with more memory",
        ),
    ],
)
def test_an_unforeseen_error_is_one_line_and_its_traceback_is_in_a_file(code: str, line: str, tmp_path: Path) -> None:
    done = program(code, TMPDIR=str(tmp_path))
    assert done.returncode == 1
    assert done.stderr.startswith(f"tied-lora merge: {line}")
    assert done.stderr.count("\n") == 1
    found = re.search(r"; the traceback is in (\S+)\n$", done.stderr)
    assert found, done.stderr
    assert "Traceback (most recent call last)" in Path(found[1]).read_text()
    assert Path(found[1]).parent == tmp_path


def test_the_traceback_is_on_stderr_before_the_line_if_asked_for_or_if_no_file_can_be_written() -> None:
    asked = program("{}['layer']", TIED_LORA_TRACEBACK="1").stderr
    unwritable = program("import tempfile; tempfile.tempdir = '/proc/none'; {}['layer']").stderr
    for printed in (asked, unwritable):
        assert printed.startswith("Traceback (most recent call last)")
        assert printed.splitlines()[-1].startswith("tied-lora merge: KeyError: 'layer'; its traceback is on stderr")


def test_what_to_lower_if_the_memory_is_too_small_depends_on_the_command() -> None:
    error = RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes")
    assert "lower model.micro_batch_size" in describe(error, "finetune")
    assert "lower batch_size or tokens_to_generate" in describe(error, "generate")
    assert "out of memory" not in describe(RuntimeError("shapes differ"), "finetune")


@pytest.mark.parametrize("shell", ["2> /dev/full", "2>&1 | true", "2>&-"])
def test_a_refusal_keeps_its_exit_code_if_nobody_can_read_it(shell: str) -> None:
    refuse = "from nemo_tied_lora.errors import *; sys.exit(report('merge', ConfigError(['a', 'b'])))"
    assert program(refuse, shell).returncode == 2


@pytest.mark.parametrize("words", ["plan model=tiny", "finetune --cfg job"])
def test_the_real_commands_end_quietly_before_head(words: str, tmp_path: Path) -> None:
    line = f"{sys.executable} -m nemo_tied_lora.commands.main {words} | head -1; exit ${{PIPESTATUS[0]}}"
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        ["bash", "-c", line], env=environment, cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode in (0, 141)
    assert done.stdout.count("\n") == 1
    assert done.stderr == ""


@pytest.mark.parametrize("variables", [{"SLURM_PROCID": "0", "SLURM_STEP_ID": "0", "SLURM_STEP_NUM_TASKS": "8"}])
@pytest.mark.parametrize("module", [merge, compare])
def test_a_command_of_one_process_refuses_to_run_in_each_of_several_tasks(
    module: object, variables: dict[str, str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    name = module.__name__.rpartition(".")[2]  # type: ignore[attr-defined]
    assert main.main([name]) == 2
    printed = capsys.readouterr().err
    assert "srun started 8 processes, and each would do all of this" in printed
    assert printed.count("\n") == 2
