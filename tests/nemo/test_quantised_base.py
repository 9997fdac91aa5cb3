# SPDX-License-Identifier: Apache-2.0
"""The whole command on a quantised base: one process of real NeMo trains, resumes, serves and merges; then two ranks train."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

from nemo_tied_lora.checkpoint.read_nemo_adapter import read_adapter
from tests.harness.command_runs import TIMEOUT, finetune, user_environment
from tests.harness.forks import fork_module, run_forked
from tests.nemo import quantised_scenarios
from tests.nemo.checkpoint_runs import COMMON
from tests.nemo.quantised_scenarios import NF4, ON_WIDE


@pytest.fixture(scope="module")
def folder(workshop: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("quantised")
    for path in workshop.iterdir():  # its files alone: other tests have made runs of the same names in the workshop
        if path.is_file():
            shutil.copy(path, folder)
    return folder


@pytest.fixture(scope="module")
def results(folder: Path) -> dict[str, dict[str, object]]:
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


@pytest.mark.parametrize("layout", ["tp2", "pp2"])
def test_the_same_adapter_comes_out_of_every_layout(
    folder: Path, results: dict[str, dict[str, object]], layout: str
) -> None:
    """The command starts the ranks. "straight" is the run on one rank, and "plain" the one without codes."""
    assert failed(results, "straight") == []
    got, metrics, printed = finetune(folder, layout, *COMMON, ON_WIDE, NF4, f"layout={layout}")
    want = read_adapter(folder / "straight" / "adapter.nemo")
    assert (got.config, got.shapes, got.state.keys()) == (want.config, want.shapes, want.state.keys())
    for name, tensor in got.state.items():
        # float32; Adam divides by small second moments, so reordered sums show in the last digits.
        assert torch.allclose(tensor, want.state[name], rtol=2e-3, atol=2e-5), name
    records = [json.loads((folder / name / "metrics.json").read_text()) for name in ("straight", "plain")]
    losses, expected, plain = ([step["loss"] for step in run["steps"]] for run in (metrics, *records))
    assert losses == pytest.approx(expected, rel=1e-4)
    assert losses != pytest.approx(plain, rel=1e-4)
    norms = [[step["grad_norm"] for step in run["steps"]] for run in (metrics, records[0])]
    assert norms[0] == pytest.approx(norms[1], rel=1e-3)
    assert metrics["base_precision"] == got.yaml["base_precision"] == "nf4/64"
    assert f"base, on rank 0: nf4/64: {4 if layout == 'pp2' else 8} linears of the decoder" in printed
    assert "Tied-LoRA rank 4: trained v B u A, tied A B" in printed


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
