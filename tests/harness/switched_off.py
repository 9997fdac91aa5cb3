# SPDX-License-Identifier: Apache-2.0
"""Switches guards off, one at a time, and says what became of the tests that are to notice.

    echo '[["nemo_tied_lora.adapter.replica_check:check_ties", "adapter/test_replica_check.py::test_a_..."]]' \
        | python -m tests.harness.switched_off

A place is `module:function` or `module:Class.method`; it then does nothing. One that ends in "()" yields nothing.
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
from typing import Any

from tests.harness.paths import ROOT

__all__ = ["VARIABLE", "switched_off"]

VARIABLE = "SWITCHED_OFF"
"""What ranks that a test spawns read: the place that is switched off in them, too."""
_OURS = ("nemo_tied_lora", "tests")


@contextmanager
def switched_off(place: str) -> Iterator[None]:
    """Inside, the named function does nothing, under whatever name and in whatever module of ours it was imported."""
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
    """A plugin that keeps why tests failed."""

    def __init__(self) -> None:
        self.failures: list[str] = []

    def pytest_runtest_logreport(self, report: Any) -> None:
        if report.failed:
            self.failures.append(report.longreprtext)


def main() -> None:
    """Runs each test of the list that it reads with its guard off; prints [exit code, why it failed] of each, as JSON."""
    from nemo_tied_lora.platform import prepare

    prepare()
    with tempfile.TemporaryDirectory() as folder:  # not where other sessions tidy up
        rows = enumerate(json.load(sys.stdin))
        json.dump([_run(place, test, f"{folder}/{number}") for number, (place, test) in rows], sys.stdout)


def _run(place: str, test: str, folder: str) -> list[Any]:
    import pytest

    for name in [name for name in sys.modules if name.startswith("tests.") and ".test_" in name]:
        del sys.modules[name]  # with what they have cached of runs before
    reports = _Reports()
    options = ["-q", "-x", "-p", "no:cacheprovider", f"--basetemp={folder}"]
    said = io.StringIO()
    with switched_off(place), redirect_stdout(said):
        code = pytest.main([*options, str(ROOT / "tests" / test)], plugins=[reports])
    return [int(code), "\n".join(reports.failures or [said.getvalue()])]


def _in_a_spawned_rank() -> None:
    """For the rest of this process."""
    from nemo_tied_lora.platform import prepare

    prepare()
    _for_good.enter_context(switched_off(os.environ[VARIABLE]))


_for_good = ExitStack()  # kept: a context that nobody refers to is left


if __name__ == "__main__":
    main()
elif os.environ.get(VARIABLE):
    _in_a_spawned_rank()
