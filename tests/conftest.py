# SPDX-License-Identifier: Apache-2.0
"""What holds for every test: a thread a rank, no test that is skipped without anyone having allowed it, and which tests
run on megatron-core alone, without NeMo."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Generator
from pathlib import Path
from typing import TypeVar

import pytest

from tests.parity import recording

__all__ = ["ALLOWED_SKIPS", "WITH_NEMO_ONLY"]

# Before torch is imported, here and in the ranks that the tests spawn: ranks share the cores, and more threads than
# cores wait for each other.
os.environ.setdefault("OMP_NUM_THREADS", "1")

ALLOWED_SKIPS = ("needs a CUDA device", *(() if os.environ.get("CI") else ("needs a SLURM",)))
"""The reasons for which a test may be skipped, as they begin; any other skip is a failure. CI must have a SLURM."""

WITH_NEMO_ONLY = (
    # What they test needs NeMo, or what comes with it.
    "test_adapter_commands.py",
    "test_adapter_controls.py",
    "test_benchmark.py",
    "test_cluster_page.py",
    "test_commands.py",
    "test_communication.py",
    "test_export.py",
    "test_guard_controls.py",
    "test_guard_cost.py",
    "test_guarded_training.py",
    "test_hugging_face.py",
    "test_import_lora.py",
    "test_launching.py",
    "test_merge.py",
    "test_nemo_loops.py",
    "test_nemo_side.py",
    "test_plan.py",
    "test_quickstart_tasks.py",
    "test_resume.py",
    "test_surviving_runs.py",
    # No Megatron is in them: they cannot differ.
    "test_allocation.py",
    "test_config.py",
    "test_configs.py",
    "test_container.py",
    "test_linters.py",
    "test_packaging.py",
    "test_run_status.py",
    "test_selection.py",
    "test_stop_signals.py",
)
"""What `make test-mcore016` leaves out, and with it tests/slurm, whose runs are NeMo's; all else runs on both releases of
megatron-core. tests/test_selection.py defends it: a file of which NeMo is no part is not left out."""

collect_ignore = [] if importlib.util.find_spec("nemo") else ["slurm", *WITH_NEMO_ONLY]

_Report = TypeVar("_Report", pytest.TestReport, pytest.CollectReport)


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_runtest_makereport() -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """A test that skips itself, or is marked so."""
    return _fail_unexpected_skip((yield))


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_make_collect_report() -> Generator[None, pytest.CollectReport, pytest.CollectReport]:
    """A module that skips itself, as with ``pytest.importorskip``."""
    return _fail_unexpected_skip((yield))


def _fail_unexpected_skip(report: _Report) -> _Report:
    expected_failure = hasattr(report, "wasxfail")
    if report.skipped and not expected_failure:
        reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
        if not reason.removeprefix("Skipped: ").startswith(ALLOWED_SKIPS):
            report.outcome = "failed"
            report.longrepr = f"skipped, for a reason that tests/conftest.py does not allow: {reason}"
    return report


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    recording.keep(report)


def pytest_sessionfinish() -> None:
    if "PYTEST_XDIST_WORKER" not in os.environ:  # a worker has seen a part of the tests
        recording.write()


@pytest.fixture(scope="session")
def workshop(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with data, a tokenizer, and a tiny base; each test names its runs apart."""
    from tests.command_runs import make_workshop

    folder = tmp_path_factory.mktemp("workshop")
    make_workshop(folder)
    return folder
