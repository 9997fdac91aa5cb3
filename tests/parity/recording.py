# SPDX-License-Identifier: Apache-2.0
"""Keeps the outcomes of tests, which prove docs/parallelism.md. Called from tests/conftest.py. Imports no Megatron."""

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
"""The file of results: PARITY_RESULTS, or runs/parity.json."""

_tests: dict[str, str] = {}
_errors: dict[str, Any] = {}


def keep(report: Any) -> None:
    """Keeps a test's outcome and the errors that it measured. The outcome of a failed set-up counts."""
    if report.when == "call" or report.outcome != "passed":
        _tests[report.nodeid] = report.outcome
    for name, value in report.user_properties:
        if name == "errors":
            _errors[report.nodeid] = value


def write() -> None:
    """Writes the results, after all tests. Does nothing if test_layouts.py did not run."""
    if not any(test.startswith("tests/parity/test_layouts.py") for test in _tests):
        return
    versions = {name: importlib.metadata.version(name) for name in ("torch", "megatron-core")}
    RESULTS.parent.mkdir(parents=True, exist_ok=True)
    RESULTS.write_text(json.dumps({"versions": versions, "tests": _tests, "errors": _errors}, indent=1) + "\n")
