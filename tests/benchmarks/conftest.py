# SPDX-License-Identifier: Apache-2.0
"""Programs in benchmarks/ import each other by their names there; so do their tests."""

from __future__ import annotations

import sys

from tests.harness.paths import ROOT

__all__: list[str] = []

sys.path.insert(0, str(ROOT / "benchmarks"))
