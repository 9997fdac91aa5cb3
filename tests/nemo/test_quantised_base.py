# SPDX-License-Identifier: Apache-2.0
"""The whole command on a quantised base: one process of real NeMo trains, resumes, serves and merges."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from tests.harness.command_runs import TIMEOUT, user_environment
from tests.harness.forks import fork_module, run_forked
from tests.nemo import quantised_scenarios


@pytest.fixture(scope="module")
def results(workshop: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, object]]:
    folder = tmp_path_factory.mktemp("quantised")
    for path in workshop.iterdir():  # its files alone: other tests have made runs of the same names in the workshop
        if path.is_file():
            shutil.copy(path, folder)
    arguments = [quantised_scenarios.__name__, [str(folder)]]
    done = run_forked(fork_module, *arguments, cwd=folder, env=user_environment(), timeout=TIMEOUT)
    assert done.returncode == 0, done.stderr[-8000:]
    return json.loads(done.stdout.splitlines()[-1])


def failed(results: dict[str, dict[str, object]], *scenarios: str) -> list[str]:
    """One line per claim that does not hold."""
    return [
        f"{scenario}: {claim}: {result}"
        for scenario in scenarios
        for claim, result in results[scenario].items()
        if result is not True
    ]


def test_a_run_on_codes_equals_the_run_on_the_dequantised_base(results: dict[str, dict[str, object]]) -> None:
    assert failed(results, "made", "straight") == []


def test_a_resumed_run_quantises_again_and_continues_bit_for_bit(results: dict[str, dict[str, object]]) -> None:
    assert failed(results, "resumed") == []


def test_a_bfloat16_base_under_o2_and_the_distributed_optimizer_can_be_quantised(
    results: dict[str, dict[str, object]],
) -> None:
    assert failed(results, "o2") == []


def test_an_adapter_on_another_precision_is_noted_with_the_measured_difference(
    results: dict[str, dict[str, object]],
) -> None:
    assert failed(results, "served") == []


def test_a_merge_measures_what_it_adds_for_an_adapter_of_a_quantised_base(
    results: dict[str, dict[str, object]],
) -> None:
    assert failed(results, "merged") == []


def test_transformers_and_peft_give_the_same_logits_under_the_recipe_of_the_card(
    results: dict[str, dict[str, object]],
) -> None:
    assert failed(results, "exported") == []
