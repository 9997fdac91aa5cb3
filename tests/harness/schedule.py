# SPDX-License-Identifier: Apache-2.0
"""A pytest plugin: which tests are slow, which ones one worker runs together, and in which order.

Tests of a group share what is expensive to make, so one worker of pytest-xdist runs them all. A group is a file, except
where `group_of` says otherwise. Workers take the groups in order, the longest first.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from tests.harness import forks
from tests.harness.paths import ROOT

__all__ = ["WITHOUT_SLOW", "group_of"]

WITHOUT_SLOW = "not slow"
"""The marker expression of `make test-fast`, which starts no NeMo."""
_SLOW_FOLDERS = ("benchmarks", "nemo", "slurm")
_SLOW_GROUPS = (
    "commands/test_demo.py",
    "commands/test_quickstart.py",
    "conversion/test_hugging_face.py",
    "parity, 4 ranks",
    "parity, 8 ranks",
    "resilience/test_ranks_in_trouble.py",
)
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
    "resilience/test_ranks_in_trouble.py",
)


def pytest_configure(config: pytest.Config) -> None:
    """The fork server of `make test-fast` does not import NeMo."""
    if WITHOUT_SLOW in config.option.markexpr:
        os.environ[forks.REFUSE_NEMO] = "1"


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    """A process that a test without the mark `slow` forks cannot import NeMo, so `make test-fast` stays fast."""
    forks.may_import_nemo = item.get_closest_marker("slow") is not None


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """`make test-fast` does not import the slow folders' modules."""
    slow = WITHOUT_SLOW in config.option.markexpr and collection_path in {
        ROOT / "tests" / name for name in _SLOW_FOLDERS
    }
    return True if slow else None


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Marks slow tests, and puts the longest groups first."""
    for item in items:
        folder = item.nodeid.removeprefix("tests/").partition("/")[0]
        slow = folder in _SLOW_FOLDERS or group_of(item.nodeid) in _SLOW_GROUPS
        if slow or "workshop" in getattr(item, "fixturenames", ()):
            item.add_marker(pytest.mark.slow)
        if folder == "slurm":
            item.add_marker(pytest.mark.slurm)
    items.sort(key=_place)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """One worker at a time gets a group."""
    from xdist.scheduler import LoadScopeScheduling

    class GroupScheduling(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            return group_of(nodeid)

    return GroupScheduling(config, log)


def group_of(nodeid: str) -> str:
    """The group of a test: "tests/parity/test_layouts.py::test_x[tp2 sp-plain]" is in "parity, 2 ranks"."""
    file, _, test = nodeid.removeprefix("tests/").partition("::")
    if file in ("nemo/test_nemo_loops.py", "nemo/test_guarded_training.py"):
        return "NeMo's fits"
    if file in ("slurm/test_disturbed_runs.py", "slurm/test_runs.py"):
        return "real runs on SLURM"
    if file.startswith("slurm/"):
        return "short jobs on SLURM"
    if file == "parity/test_layouts.py":
        from tests.parity.layouts import LAYOUTS

        layout = LAYOUTS.get(test.partition("[")[2].partition("-")[0], LAYOUTS["tp2"])
        return f"parity, {layout.world_size} ranks"
    return file


def _place(item: pytest.Item) -> int:
    group = group_of(item.nodeid)
    return _LONGEST_FIRST.index(group) if group in _LONGEST_FIRST else len(_LONGEST_FIRST)
