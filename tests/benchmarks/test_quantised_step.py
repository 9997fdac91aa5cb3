# SPDX-License-Identifier: Apache-2.0
"""One forked process: the benchmark of a step on a quantised base measures real models, and checks its bound."""

from __future__ import annotations

import json
import re
import sys
from typing import Any

import pytest

from tests.harness.command_runs import TIMEOUT, user_environment
from tests.harness.forks import fork_script, run_forked
from tests.harness.paths import ROOT

sys.path.insert(0, str(ROOT / "benchmarks"))

import quantised_step

PAGE = (ROOT / "docs" / "costs.md").read_text()


@pytest.fixture(scope="module")
def result(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """One measurement: one layer, 64 tokens, two rounds."""
    folder = tmp_path_factory.mktemp("step")
    words = ["--layers", "1", "--tokens", "64", "--repeats", "2", "--output", "result.json", "--page", "page.md"]
    (folder / "page.md").write_text("\n".join(["before", *quantised_step.MARKS, "after"]))
    script = [ROOT / "benchmarks" / "quantised_step.py", words]
    done = run_forked(fork_script, *script, cwd=folder, env=user_environment(), timeout=TIMEOUT)
    found = json.loads((folder / "result.json").read_text())
    assert done.returncode == (0 if quantised_step.within_bound(found) else 1), done.stderr[-4000:]
    page = (folder / "page.md").read_text()
    assert quantised_step.table(found) in page
    assert page.startswith("before")
    assert page.endswith("after")
    return found


def test_each_model_is_the_one_of_its_name(result: dict[str, Any]) -> None:
    """Codes change the loss a little, and so does an adapter whose factors are not zero. Backward takes time of each."""
    losses = result["losses"]
    assert list(losses) == [f"{held}{more}" for held in ("bf16", "nf4", "int8") for more in ("", " + tl6")]
    assert len(set(losses.values())) == 6
    assert all(abs(loss - losses["bf16"]) < 0.1 for loss in losses.values())
    assert all(len(seconds) == 2 and min(seconds) > 0 for seconds in result["rounds"].values())
    frozen = result["ratios"]["nf4"]["to bf16"]
    first, second = (a / b for a, b in zip(result["rounds"]["nf4"], result["rounds"]["bf16"], strict=True))
    assert (frozen["min"], frozen["max"]) == (min(first, second), max(first, second))


def test_the_bound_is_of_the_frozen_step_on_nf4(result: dict[str, Any]) -> None:
    def with_ratio(name: str, ratio: float) -> dict[str, Any]:
        own = {**result["ratios"][name], "to bf16": {"min": ratio, "median": ratio, "max": ratio}}
        return {
            **result,
            "ratios": {**result["ratios"], "nf4": {"to bf16": {"min": 1, "median": 1, "max": 1}}, name: own},
        }

    assert quantised_step.within_bound(with_ratio("nf4", 1.6))
    assert not quantised_step.within_bound(with_ratio("nf4", 1.61))
    assert quantised_step.within_bound(with_ratio("int8", 1.61))


def test_the_page_shows_a_measurement_of_all_layers_that_meets_the_bound() -> None:
    begin, end = quantised_step.MARKS
    shown = PAGE.split(begin)[1].split(end)[0]
    assert len(re.findall(r"^\| (?:bf16|nf4|int8) \|", shown, re.M)) == 3
    assert re.search(r"takes (\d\.\d\d)\s+times as long: met\. 30 layers of 576 x 1536, 512 tokens", shown)
