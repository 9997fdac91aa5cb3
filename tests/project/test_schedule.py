# SPDX-License-Identifier: Apache-2.0
"""Tests that share what is expensive are in one group, and `make test-fast` forks no process that can import NeMo."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.harness import schedule
from tests.harness.command_runs import user_environment
from tests.harness.forks import fork_program, run_forked
from tests.harness.paths import ROOT


@pytest.mark.parametrize(
    ("nodeid", "group"),
    [
        ("tests/parity/test_layouts.py::test_a[tp2 sp-one query group]", "parity, 2 ranks"),
        ("tests/parity/test_layouts.py::test_a[tp2 sp pp2 dp2-plain]", "parity, 8 ranks"),
        ("tests/parity/test_layouts.py::test_without_parameters", "parity, 2 ranks"),
        ("tests/nemo/test_nemo_loops.py::test_a[O1-tp2]", "NeMo's fits"),
        ("tests/nemo/test_guarded_training.py::test_a", "NeMo's fits"),
        ("tests/test_tables.py::test_a", "test_tables.py"),
    ],
)
def test_a_group_is_a_file_or_what_shares_its_ranks(nodeid: str, group: str) -> None:
    assert schedule.group_of(nodeid) == group


def test_the_longest_groups_exist() -> None:
    for group in schedule._LONGEST_FIRST:
        assert "," in group or " " in group or (ROOT / "tests" / group).is_file(), group


def test_a_process_that_a_test_without_the_mark_slow_forks_cannot_import_nemo(tmp_path: Path) -> None:
    done = run_forked(fork_program, "import nemo", cwd=tmp_path, env=user_environment(), timeout=100)
    assert done.returncode != 0
    assert "import of nemo halted" in done.stderr


def test_a_test_that_starts_nemo_without_its_mark_fails_in_make_test_fast(tmp_path: Path) -> None:
    (tmp_path / "test_planted.py").write_text(
        "from tests.harness.forks import fork_program, run_forked\n"
        "from tests.harness.command_runs import user_environment\n"
        "def test_planted(tmp_path):\n"
        "    done = run_forked(fork_program, 'import nemo', cwd=tmp_path, env=user_environment(), timeout=100)\n"
        "    assert done.returncode == 0, done.stderr\n"
    )
    place = ["--rootdir", str(ROOT), "-c", str(ROOT / "pyproject.toml"), "-p", "no:cacheprovider"]
    command = [sys.executable, "-m", "pytest", *place, "-p", "tests.harness.schedule", "-m", schedule.WITHOUT_SLOW]
    done = subprocess.run(
        [*command, str(tmp_path)], cwd=ROOT, env=user_environment(), capture_output=True, text=True, check=False
    )
    assert done.returncode == pytest.ExitCode.TESTS_FAILED, done.stdout
    assert "import of nemo halted" in done.stdout
