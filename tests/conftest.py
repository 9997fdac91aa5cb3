# SPDX-License-Identifier: Apache-2.0
"""What holds for every test: one thread per rank, no skip that this file does not allow, which folders need NeMo, and
what tests share."""

from __future__ import annotations

import importlib.util
import os
import shutil
from collections.abc import Generator
from pathlib import Path
from typing import TypeVar

import pytest

from tests.parity import recording

__all__ = ["ALLOWED_SKIPS", "NEED_BRIDGE", "NEED_NEMO", "NEED_SERVING"]

pytest_plugins = ["tests.harness.schedule"]

# Before torch is imported, here and in the ranks that tests start: with more threads than cores, threads wait for each other.
os.environ.setdefault("OMP_NUM_THREADS", "1")

ALLOWED_SKIPS = ("needs a CUDA device", *(() if os.environ.get("CI") else ("needs a SLURM",)))
"""How the allowed reasons of a skip begin. Any other skip is a failure. CI must have a SLURM."""

NEED_NEMO = (
    *("benchmarks", "commands", "conversion", "launching", "nemo", "project", "slurm", "tasks"),
    # What only NeMo's configuration and files have. It imports no torch, and does not depend on megatron-core.
    *("planning/test_base_files.py", "planning/test_nemo_archive.py", "planning/test_nemo_yaml.py"),
    *("planning/test_nemo_generation_keys.py", "planning/test_values_of_another_kind.py"),
    *("planning/test_data_files.py", "planning/test_data_lines.py", "planning/test_data_page.py"),
    *("planning/test_override_lines.py", "planning/test_prompt_template.py", "planning/test_run_numbers.py"),
    # What does not depend on megatron-core, and takes seconds: it would be the same test twice.
    *("planning/test_layout_fits_cluster.py", "planning/test_shipped_configs.py"),
    *("checkpoint/test_nemo_file_damaged.py", "checkpoint/test_nemo_file_durability.py"),
    "resilience/test_ranks_in_trouble.py",
)
"""The folders and files that `make test-mcore016` leaves out. All others run on both releases of megatron-core."""

NEED_BRIDGE = ("bridge",)
"""The folders that need Megatron-Bridge: only `make test-bridge` runs them."""

NEED_SERVING = ("serving",)
"""The folders that need vLLM's environment: only `make test-serving` runs them. SERVING_PYTHON names its interpreter."""

collect_ignore = [
    *([] if importlib.util.find_spec("nemo") else NEED_NEMO),
    *([] if importlib.util.find_spec("megatron.bridge") else NEED_BRIDGE),
    *([] if os.environ.get("SERVING_PYTHON") else NEED_SERVING),
]

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
    """A folder with data, a tokenizer and a tiny base. Each test gives its runs names of their own.

    pytest's workers share one base: the first that asks makes it, and each has a copy.
    """
    from filelock import FileLock

    from tests.harness.command_runs import make_workshop

    several = "PYTEST_XDIST_WORKER" in os.environ
    shared = tmp_path_factory.getbasetemp() / (".." if several else "") / "shared-workshop"
    with FileLock(f"{shared}.lock"):
        if not (shared / "base.nemo").exists():
            shared.mkdir(exist_ok=True)
            make_workshop(shared)
    return Path(shutil.copytree(shared, tmp_path_factory.mktemp("workshop"), dirs_exist_ok=True))
