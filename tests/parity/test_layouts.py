# SPDX-License-Identifier: Apache-2.0
"""Several ranks (1, 2, 4 and 8, started once each): every layout reproduces the single-process run."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace

import pytest

from nemo_tied_lora.planning.megatron_version import megatron_version
from tests.parity.comparison import unequal_replicas, worst
from tests.parity.layouts import LAYOUTS, layouts_on
from tests.parity.runs import FAULTS, runs_of
from tests.parity.suite import all_runs, oracle, verdicts

CASES = [(layout, run) for layout in layouts_on(megatron_version()) for run in runs_of(layout)]
QUANTISED = [(layout, run) for layout, run in CASES if runs_of(layout)[run].base is not None]
PLANTED = [(layout, fault) for layout, faults in FAULTS.items() for fault in faults]


@pytest.mark.parametrize(("layout", "run"), CASES)
def test_the_layout_reproduces_the_single_process_run(
    layout: str, run: str, record_property: Callable[[str, object], None]
) -> None:
    """Compares each loss, gradient and norm, the adapter after two steps, and the output before the first with the base's."""
    ranks = verdicts(layout, run)
    record_property("errors", dict(worst(ranks)))
    assert [problem for verdict in ranks for problem in verdict.problems] == []
    assert {verdict.starts_as_base for verdict in ranks} <= {True, None}
    assert True in {verdict.starts_as_base for verdict in ranks}


@pytest.mark.parametrize(("layout", "run"), CASES)
def test_ranks_that_hold_the_same_element_hold_the_same_bits_after_every_step(layout: str, run: str) -> None:
    ranks = verdicts(layout, run)
    whole = {name: tuple(tensor.shape) for name, tensor in oracle(runs_of(layout)[run]).state.items()}
    assert unequal_replicas(ranks, LAYOUTS[layout], whole) == []


@pytest.mark.parametrize(("layout", "run"), QUANTISED)
def test_a_quantised_base_gives_the_bits_of_the_dequantised_one(layout: str, run: str) -> None:
    """Compares with the run on the dequantised base on the same layout, and the codes with the whole weights' codes."""
    assert [verdict.unequal for verdict in verdicts(layout, run)] == [[]] * LAYOUTS[layout].world_size


def test_another_code_is_another_run_and_other_codes_of_the_whole() -> None:
    found = [set(verdict.unequal or ()) for verdict in verdicts("tp2", "another code")]
    codes = "codes of decoder.layers.1.self_attention.linear_proj.weight"
    assert all({codes, "losses", "norms", "linear_fc1.B", "layers.0.linear_proj.u"} <= rank for rank in found)


@pytest.mark.parametrize(("layout", "fault"), PLANTED)
def test_a_planted_error_is_noticed(layout: str, fault: str) -> None:
    assert all_runs(layout)[fault].fault == fault
    assert [problem for verdict in verdicts(layout, fault) for problem in verdict.problems]


def test_a_replica_with_another_bit_is_noticed_whether_whole_or_a_shard() -> None:
    ranks = copy.deepcopy(verdicts("tp2", "plain"))
    whole = {name: tuple(tensor.shape) for name, tensor in oracle(runs_of("tp2")["plain"]).state.items()}
    assert unequal_replicas(ranks, LAYOUTS["tp2"], whole) == []
    ranks[1].bits[0][0, "linear_qkv.A"] = ranks[1].bits[0][0, "layers.1.linear_fc2.v"] = "other"
    ranks[1].bits[1][0, "linear_qkv.B"] = "another shard"
    found = {"step 0: layers.1.linear_fc2.v (shard None)", "step 0: linear_qkv.A (shard None)"}
    assert set(unequal_replicas(ranks, LAYOUTS["tp2"], whole)) == found
    pipeline = replace(LAYOUTS["tp2"], tp=1, pp=2)
    assert "step 1: linear_qkv.A (shard None)" not in unequal_replicas(ranks, pipeline, whole)
    assert "step 1: linear_qkv.B (shard 0)" in unequal_replicas(ranks, pipeline, whole)
