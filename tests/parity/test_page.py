# SPDX-License-Identifier: Apache-2.0
"""docs/parallelism.md says what the suite's cells say, and each cell that claims something has a test that proves it."""

from __future__ import annotations

import pytest

from tests.parity.cells import GPU, tables
from tests.parity.table import PAGE, page, unproven

EVERY_CELL = [cell for table in tables() for row in table.rows.values() for cell in row]
EVIDENCE = {test for cell in EVERY_CELL for test in cell.evidence}


def test_the_page_is_the_cells() -> None:
    assert PAGE.read_text() == page(), "make parallelism-page writes it anew"


def test_a_cell_is_tested_or_refused_or_needs_a_gpu_and_nothing_else() -> None:
    for cell in EVERY_CELL:
        assert cell.text.startswith(("tested, ", "refused: ")) or cell.text == GPU
        assert bool(cell.evidence) is (cell.text != GPU)


def test_every_test_that_a_cell_names_exists(request: pytest.FixtureRequest) -> None:
    """Of the files that this run has collected."""
    collected = {item.nodeid for item in request.session.items}
    files = {test.partition("::")[0] for test in collected}
    parametrized = {test.partition("[")[0] for test in collected}
    assert [t for t in EVIDENCE if t.partition("::")[0] in files and t not in collected | parametrized] == []


def test_a_cell_without_a_passed_test_is_not_written() -> None:
    passed = dict.fromkeys(EVIDENCE, "passed")
    assert unproven(passed) == []
    test = min(EVIDENCE)
    for outcome in ("failed", "skipped", None):
        outcomes = {**passed, test: outcome} if outcome else {t: "passed" for t in EVIDENCE if t != test}
        assert [line.split(": ")[-1] for line in unproven(outcomes)] == [outcome or "not run"]
