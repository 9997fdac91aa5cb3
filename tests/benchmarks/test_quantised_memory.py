# SPDX-License-Identifier: Apache-2.0
"""Pure text: the table of the memory of a quantised base, and its place in the page. The page records the measurement."""

from __future__ import annotations

import re
import sys

import pytest

from tests.harness.paths import ROOT

sys.path.insert(0, str(ROOT / "benchmarks"))

import quantised_memory
from command_line import between_marks

PAGE = ROOT / "docs" / "costs.md"


def test_the_table_has_a_row_for_each_measurement_and_replaces_the_pages_own() -> None:
    one = {"base": 2 << 20, "planned_base": 1 << 20, "kept_for_backward": 0, "one_linear_peak": 1 << 19}
    codes = {"quantised": 1 << 20, "bits_per_weight": 4.25, "planned_peak": 1 << 19}
    table = quantised_memory.table({"tiny": {"bf16": {**one, "planned_base": 2 << 20}, "nf4": {**one, **codes}}})
    assert "| tiny | bf16 | 16 | 2.0 | 2.0 (+0.0%) | 0.0 | 0.5 | 0 |" in table
    assert "| tiny | nf4 | 4.250 | 1.0 | 1.0 (+0.0%) | 0.0 | 0.5 | 0.5 |" in table
    page = between_marks(PAGE.read_text(), *quantised_memory.MARKS, table)
    assert page.count(table) == 1
    assert "SmolLM2-135M | nf4" not in page
    with pytest.raises(SystemExit, match="the page has no"):
        between_marks("nothing", *quantised_memory.MARKS, table)


def test_the_plan_agrees_with_every_measurement_of_the_page_within_5_percent() -> None:
    shown = re.findall(r"^\| \S+ \|.*\(([+-][\d.]+)%\)", PAGE.read_text(), flags=re.M)
    assert len(shown) >= len(quantised_memory.SETTINGS)
    assert all(abs(float(share)) <= 5 for share in shown)
