# SPDX-License-Identifier: Apache-2.0
"""Keeps what each test of a run came to, for the page that is made of it; called from tests/conftest.py. No Megatron."""

from __future__ import annotations

import importlib.metadata
import json
import os
from pathlib import Path
from typing import Any

from tests.harness.paths import ROOT

__all__ = ["RESULTS", "RUNS", "keep", "write"]

RUNS = ROOT / "runs"
RESULTS = Path(os.environ.get("PARITY_RESULTS", RUNS / "parity.json"))
"""Where the results go: PARITY_RESULTS, or runs/parity.json."""

_tests: dict[str, str] = {}
_errors: dict[str, Any] = {}


def keep(report: Any) -> None:
    """A test's outcome, and the errors that it measured; a failed set-up counts as its outcome."""
    if report.when == "call" or report.outcome != "passed":
        _tests[report.nodeid] = report.outcome
    for name, value in report.user_properties:
        if name == "errors":
            _errors[report.nodeid] = value


def write() -> None:
    """Once, after all tests; nothing where no test of this folder ran."""
    if not any(test.startswith("tests/parity/test_layouts.py") for test in _tests):
        return
    versions = {name: importlib.metadata.version(name) for name in ("torch", "megatron-core")}
    RESULTS.parent.mkdir(parents=True, exist_ok=True)
    RESULTS.write_text(json.dumps({"versions": versions, "tests": _tests, "errors": _errors}, indent=1) + "\n")
