# SPDX-License-Identifier: Apache-2.0
"""Pure: docs/parallelism.md shows the suite's cells, and tests prove each cell that makes a claim."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from nemo_tied_lora.planning.megatron_version import megatron_version
from tests.conftest import NEED_NEMO
from tests.parity import table
from tests.parity.cells import GPU, NEWER, NEWEST, OLDER, tables
from tests.parity.table import PAGE, page, unproven

EVERY_CELL = [cell for table in tables() for row in table.rows.values() for cell in row]
RELEASES = (OLDER, NEWER, NEWEST)
PROOF = {release: {test for cell in EVERY_CELL for test in cell.proof(release)} for release in RELEASES}


def test_the_page_shows_the_cells() -> None:
    assert PAGE.read_text() == page(), "make parallelism-page writes it again"


def test_a_cell_is_tested_or_refused_or_needs_a_gpu() -> None:
    for cell in EVERY_CELL:
        known = ("tested, ", "equal bits, ", "refused: ", "tested on 0.16.1, ")
        assert cell.text.startswith(known) or cell.text in (GPU, "")
        assert bool(cell.evidence or cell.newest) is (cell.text not in (GPU, ""))


@pytest.mark.slow  # `make test-fast` does not collect all of a file's tests
def test_every_test_that_a_cell_names_exists(request: pytest.FixtureRequest) -> None:
    """Checks the installed release, in the files that this run has collected."""
    collected = {item.nodeid for item in request.session.items}
    files = {test.partition("::")[0] for test in collected}
    parametrized = {test.partition("[")[0] for test in collected}
    assert [
        t for t in PROOF[megatron_version()] if t.partition("::")[0] in files and t not in collected | parametrized
    ] == []


@pytest.mark.parametrize("release", RELEASES)
def test_a_cell_without_a_passed_test_is_not_proven(release: tuple[int, ...]) -> None:
    passed = dict.fromkeys(PROOF[release], "passed")
    assert unproven(passed, release) == []
    test = min(PROOF[release])
    for outcome in ("failed", "skipped", None):
        outcomes = {**passed, test: outcome} if outcome else {t: "passed" for t in PROOF[release] if t != test}
        assert [line.split(": ")[-1] for line in unproven(outcomes, release)] == [outcome or "not run"]


def test_a_refusal_on_the_older_release_and_the_run_on_the_newer_one_are_proven() -> None:
    refused = [cell for cell in EVERY_CELL if "refused on 0.13.1" in cell.text]
    assert refused
    for cell in refused:
        assert all(test.startswith("tests/parity/test_refusals.py") for test in cell.proof(OLDER))
        assert all(test.startswith("tests/parity/test_layouts.py") for test in cell.proof(NEWER))
        assert cell.proof(OLDER)
        assert cell.proof(NEWER)


def test_the_newer_release_must_prove_every_cell_except_nemos_loops() -> None:
    left_out = {test for cell in EVERY_CELL if not cell.proof(NEWER) for test in cell.evidence}
    assert {test.partition("::")[0] for test in left_out} == {"tests/nemo/test_nemo_loops.py"}
    assert "nemo" in NEED_NEMO


def test_the_check_needs_the_complete_results_of_every_release(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(table, "RUNS", tmp_path)
    monkeypatch.setattr("sys.argv", ["table", "--check"])
    with pytest.raises(SystemExit, match=r"parity\.json: not found\n.*parity-mcore016\.json: not found"):
        table.main()
    files = {
        "parity.json": ("0.13.1", OLDER),
        "parity-mcore016.json": ("0.16.1", NEWER),
        "parity-mcore019.json": ("0.19.2", NEWEST),
    }
    results = {name: _results(version, PROOF[release]) for name, (version, release) in files.items()}
    _write(tmp_path, results)
    table.main()
    assert "every cell of parity.json, parity-mcore016.json, parity-mcore019.json proven" in capsys.readouterr().out
    missing = min(PROOF[NEWER])
    del results["parity-mcore016.json"]["tests"][missing]
    _write(tmp_path, results)
    with pytest.raises(SystemExit, match=re.escape(f"{missing}: not run")):
        table.main()
    monkeypatch.setattr("sys.argv", ["table", "--check", "parity-mcore019.json"])
    table.main()
    monkeypatch.setattr("sys.argv", ["table", "--check"])
    _write(tmp_path, dict.fromkeys(files, results["parity.json"]))
    with pytest.raises(SystemExit, match=r"parity-mcore016\.json: was made with megatron-core 0\.13\.1"):
        table.main()


def _results(version: str, tests: set[str]) -> dict[str, Any]:
    return {"versions": {"megatron-core": version}, "tests": dict.fromkeys(tests, "passed")}


def _write(folder: Path, results: dict[str, Any]) -> None:
    for name, content in results.items():
        (folder / name).write_text(json.dumps(content))
