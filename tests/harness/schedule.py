# SPDX-License-Identifier: Apache-2.0
"""A pytest plugin: which tests are slow, which ones one worker runs together, and in which order.

Tests of a group share what is expensive to make, so one worker (pytest-xdist, `--dist loadgroup`) runs them all. A group is
a file, except where `_group` says otherwise. Workers take the groups in order, the longest first.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tests.harness.forks import REFUSE_NEMO
from tests.harness.paths import ROOT

__all__ = ["WITHOUT_SLOW"]

WITHOUT_SLOW = "not slow"
"""The marker expression of `make test-fast`, which starts no NeMo."""
_SLOW_FOLDERS = ("benchmarks", "nemo", "slurm")
_LONGEST_FIRST = (
    "nemo/test_resume.py",
    "NeMo's fits",
    "commands/test_console_script.py",
    "parity, 4 ranks",
    "parity, 8 ranks",
    "benchmarks/test_communication.py",
    "nemo/test_surviving_runs.py",
    "commands/test_demo.py",
    "parity, 2 ranks",
    "nemo/test_guard_controls.py",
    "commands/test_training_commands.py",
)


def pytest_configure(config: pytest.Config) -> None:
    """Processes that `make test-fast` forks cannot import NeMo, so that a slow test without its mark fails there."""
    if WITHOUT_SLOW in config.option.markexpr:
        os.environ[REFUSE_NEMO] = "1"


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """`make test-fast` does not import the slow folders' modules."""
    slow = WITHOUT_SLOW in config.option.markexpr and collection_path in {
        ROOT / "tests" / name for name in _SLOW_FOLDERS
    }
    return True if slow else None


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Marks slow tests and groups, and puts the longest groups first."""
    for item in items:
        if "workshop" in getattr(item, "fixturenames", ()) or _folder(item) in _SLOW_FOLDERS:
            item.add_marker(pytest.mark.slow)
        if item.get_closest_marker("xdist_group") is None:
            item.add_marker(pytest.mark.xdist_group(_group(item)))
    items.sort(key=_place)


def _group(item: pytest.Item) -> str:
    file = item.path.relative_to(ROOT / "tests").as_posix()
    if file in ("nemo/test_nemo_loops.py", "nemo/test_guarded_training.py"):
        return "NeMo's fits"
    if file == "parity/test_layouts.py":
        from tests.parity.layouts import LAYOUTS

        parameters = getattr(item, "callspec", None)
        layout = LAYOUTS[parameters.params["layout"]] if parameters else LAYOUTS["tp2"]
        return f"parity, {layout.world_size} ranks"
    return file


def _place(item: pytest.Item) -> int:
    marker = item.get_closest_marker("xdist_group")
    group = marker.args[0] if marker else ""
    return _LONGEST_FIRST.index(group) if group in _LONGEST_FIRST else len(_LONGEST_FIRST)


def _folder(item: pytest.Item) -> str:
    return item.path.relative_to(ROOT / "tests").parts[0]
