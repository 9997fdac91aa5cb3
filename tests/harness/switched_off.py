# SPDX-License-Identifier: Apache-2.0
"""Switches guards off, one at a time, and reports whether the tests that must notice it fail.

A place is `module:function` or `module:Class.method`. While it is switched off it returns None, or an empty tuple if
the place ends in "()".
"""

from __future__ import annotations

import functools
import importlib
import io
import json
import os
import sys
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, redirect_stdout
from pathlib import Path
from typing import Any

from tests.harness.paths import ROOT

__all__ = ["VARIABLE", "leave_switched_off", "run_tests", "switched_off"]

VARIABLE = "SWITCHED_OFF"
"""The environment variable that passes the place to the ranks that a test starts."""
_OURS = ("nemo_tied_lora", "tests")


@contextmanager
def switched_off(place: str) -> Iterator[None]:
    """In this context the function at `place` does nothing, in all of our modules that have imported it, under any name."""
    module, _, name = place.removesuffix("()").partition(":")
    owner: Any = importlib.import_module(module)
    *path, last = name.split(".")
    owner = functools.reduce(getattr, path, owner)
    original = owner.__dict__[last]
    nothing = () if place.endswith("()") else None

    def do_nothing(*args: Any, **kwargs: Any) -> Any:
        return nothing

    modules = [m for name, m in list(sys.modules.items()) if name.split(".")[0] in _OURS]
    places = [(owner, last)] + [(m, key) for m in modules for key, value in vars(m).items() if value is original]
    for holder, key in places:
        setattr(holder, key, do_nothing)
    os.environ[VARIABLE] = place
    try:
        yield
    finally:
        del os.environ[VARIABLE]
        for holder, key in places:
            setattr(holder, key, original)


class _Reports:
    """A pytest plugin that collects the reports of failed tests."""

    def __init__(self) -> None:
        self.failures: list[str] = []

    def pytest_runtest_logreport(self, report: Any) -> None:
        if report.failed:
            self.failures.append(report.longreprtext)


def run_tests(rows: list[tuple[str, str]], output: str) -> int:
    """Runs each (place, test) with the guard off. Writes [exit code, report of the failure] of each to `output`, as JSON.

    Call it in a separate process: it imports the tests' modules again for each test.
    """
    with tempfile.TemporaryDirectory() as folder:  # other sessions clean pytest's default folder
        results = [_run(place, test, f"{folder}/{number}") for number, (place, test) in enumerate(rows)]
    Path(output).write_text(json.dumps(results))
    return 0


def _run(place: str, test: str, folder: str) -> list[Any]:
    import pytest

    for name in [name for name in sys.modules if name.startswith("tests.") and ".test_" in name]:
        del sys.modules[name]  # and their caches of earlier runs
    reports = _Reports()
    options = ["-q", "-x", "-p", "no:cacheprovider", f"--basetemp={folder}"]
    printed = io.StringIO()
    with switched_off(place), redirect_stdout(printed):
        code = pytest.main([*options, str(ROOT / "tests" / test)], plugins=[reports])
    return [int(code), "\n".join(reports.failures or [printed.getvalue()])]


def leave_switched_off() -> None:
    """Switches the guard off for the rest of this process, a rank that a test started while the guard was off."""
    if place := os.environ.get(VARIABLE):
        _never_left.enter_context(switched_off(place))


_never_left = ExitStack()
