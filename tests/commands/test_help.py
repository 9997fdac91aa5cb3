# SPDX-License-Identifier: Apache-2.0
"""--help of every command, and a reader that closes the pipe. The whole command, without ranks."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from nemo_tied_lora.commands.main import COMMANDS, main
from tests.harness.paths import ROOT


@pytest.mark.parametrize("command", COMMANDS)
def test_help_shows_examples_and_no_empty_heading(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main([command, "--help"])
    assert ended.value.code == 0
    lines = capsys.readouterr().out.splitlines()
    headings = [number for number, line in enumerate(lines) if line.endswith(":") and not line.startswith(" ")]
    assert any(line.startswith(f"  tied-lora {command} ") for line in lines[lines.index("examples:") :])
    assert [lines[number] for number in headings if not lines[number + 1].startswith("  ")] == []


@pytest.mark.parametrize("arguments", [["--help"], ["status", "--help"], ["plan", "model=llama2_7b"]])
@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_a_reader_that_has_gone_ends_the_command_quietly(arguments: list[str], unbuffered: str) -> None:
    read, write = os.pipe()
    os.close(read)
    command = [sys.executable, "-W", "ignore", "-m", "nemo_tied_lora.commands.main", *arguments]
    environment = {**os.environ, "PYTHONUNBUFFERED": unbuffered}
    done = subprocess.run(
        command, stdout=write, stderr=subprocess.PIPE, cwd=ROOT, env=environment, text=True, timeout=120, check=False
    )
    os.close(write)
    assert done.stderr == ""
    assert done.returncode in (0, 141)  # argparse itself drops the error
