# SPDX-License-Identifier: Apache-2.0
"""Keeps the results of all tests of a run in which this folder's are, the other folders' too."""

from __future__ import annotations

import os

import pytest

from tests.parity import recording


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    recording.keep(report)


def pytest_sessionfinish() -> None:
    if "PYTEST_XDIST_WORKER" not in os.environ:  # a worker has seen a part of the tests
        recording.write()
