# SPDX-License-Identifier: Apache-2.0
"""shellcheck and hadolint accept the shell scripts and the Dockerfile. The extra `dev` installs both."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.harness.paths import ROOT

FOLDERS = ("launch", "nemo_tied_lora", "tests", ".ci")
# Scripts that `tied-lora launch` writes.
RENDERED = [ROOT / "tests" / "launching" / "golden" / f"{name}.txt" for name in ("one_run", "container", "sweep")]


def test_the_scripts_are_shellcheck_clean(tmp_path: Path) -> None:
    scripts = [*_shell_scripts(), *(_script_of(golden, tmp_path) for golden in RENDERED)]
    assert {"finetune.sbatch", "torchrun.sh", "run", "sweep.sbatch"} <= {script.name for script in scripts}
    done = _lint("shellcheck", *scripts)
    assert done.returncode == 0, done.stdout


def test_the_dockerfile_is_hadolint_clean() -> None:
    done = _lint("hadolint", "--failure-threshold", "style", ROOT / "Dockerfile")
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize(
    ("linter", "text", "rule"),
    [
        ("shellcheck", '#!/usr/bin/env bash\nrm -rf $1/"logs"\n', "SC2086"),
        ("hadolint", "FROM debian:12\nRUN apt-get install git\n", "DL3008"),
    ],
)
def test_a_linter_that_finds_something_fails(tmp_path: Path, linter: str, text: str, rule: str) -> None:
    (tmp_path / "bad").write_text(text)
    done = _lint(linter, tmp_path / "bad")
    assert done.returncode != 0
    assert rule in done.stdout


def _shell_scripts() -> Iterator[Path]:
    """Returns every file whose first line names a shell."""
    for path in sorted(path for folder in FOLDERS for path in (ROOT / folder).rglob("*") if path.is_file()):
        with path.open("rb") as file:
            if file.readline().startswith((b"#!/usr/bin/env bash", b"#!/bin/sh", b"#!/bin/bash")):
                yield path


def _script_of(golden: Path, folder: Path) -> Path:
    """Writes the script of a launch to a file. The text before and after it is not shell."""
    script = golden.read_text().split("# ----- ")[1].partition("\n")[2]
    path = folder / f"{golden.stem}.sbatch"
    path.write_text(script)
    return path


def _lint(name: str, *words: str | Path) -> subprocess.CompletedProcess[str]:
    program = Path(sys.executable).with_name(name)
    return subprocess.run([program, *words], capture_output=True, text=True, check=False)
