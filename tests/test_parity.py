# SPDX-License-Identifier: Apache-2.0
"""Two ranks: every loss, gradient, norm and trained tensor equals the single-process run's."""

from __future__ import annotations

import functools

import pytest
import torch

from tests.ranks import run_ranks
from tests.training import Run, TrainingRecord, train_all

# Sums are only reordered: float64 leaves about 1e-13; Adam's division magnifies that where a gradient is small.
RELATIVE = 1e-9

ALL = ["linear_qkv", "linear_proj", "linear_fc1", "linear_fc2"]
RUNS = {
    "tl6": Run(config={"preset": "tl6", "rank": 3, "alpha": 5.0, "targets": ALL}),
    "lora": Run(config={"preset": "lora", "rank": 3, "targets": ALL}),
    "tl5": Run(config={"preset": "tl5", "rank": 3, "targets": ALL}),
    "vera": Run(config={"preset": "vera", "rank": 3, "targets": ALL}),
    "v alone, A tied": Run(config={"trained": ["v"], "tied": ["A"], "rank": 3, "targets": ALL}),
    "u alone, B tied": Run(config={"trained": ["u"], "tied": ["B"], "rank": 3, "targets": ALL}),
    "A alone": Run(config={"trained": ["A"], "rank": 3, "targets": ALL}),
    "one stage's layers": Run(
        config={"preset": "tl6", "rank": 3, "layers": [3], "targets": ["linear_qkv", "linear_fc2"]}
    ),
    "first stage's layers": Run(config={"preset": "tl6", "rank": 3, "layers": [0], "targets": ["linear_proj"]}),
    "llama": Run(config={"preset": "tl6", "rank": 3, "targets": ALL}, model={"llama": True, "groups": 2}),
}
FAULTS = ("no_sum", "sum_twice", "stepped_twice")
LAYOUTS: dict[str, dict[str, int]] = {"single": {}, "tp2": {"tp": 2}, "pp2": {"pp": 2}}


@functools.cache
def outcome(layout: str) -> dict[str, list[TrainingRecord]] | AssertionError:
    """Every run on one layout, each rank's record; the ranks are spawned once, also when they fail."""
    sizes = LAYOUTS[layout]
    faults = {fault: Run(config=RUNS["tl6"].config, fault=fault) for fault in FAULTS} if layout == "pp2" else {}
    world_size = sizes.get("tp", 1) * sizes.get("pp", 1)
    try:
        ranks = run_ranks(train_all, {**RUNS, **faults}, world_size=world_size, **sizes)
    except AssertionError as failure:
        return failure
    return {name: [rank[name] for rank in ranks] for name in ranks[0]}


def records(layout: str) -> dict[str, list[TrainingRecord]]:
    """What the ranks of a layout recorded, run name to one record a rank."""
    result = outcome(layout)
    if isinstance(result, AssertionError):
        raise result
    return result


def oracle(name: str) -> TrainingRecord:
    """The single-process run."""
    return records("single")[name][0]


def differences(run: list[TrainingRecord], expected: TrainingRecord) -> list[str]:
    """Where a run departs from the oracle, a line each; empty when it reproduces it."""
    found = []
    losses = run[-1].losses
    if not torch.allclose(torch.tensor(losses), torch.tensor(expected.losses), rtol=RELATIVE, atol=0):
        found.append(f"losses {losses} != {expected.losses}")
    for rank, record in enumerate(run):
        if not torch.allclose(torch.tensor(record.norms), torch.tensor(expected.norms), rtol=RELATIVE, atol=0):
            found.append(f"rank {rank}: norms {record.norms} != {expected.norms}")
        pairs = [
            (f"gradient {s}", g, w) for s, (g, w) in enumerate(zip(record.gradients, expected.gradients, strict=True))
        ]
        for what, got, want in [*pairs, ("adapter", record.state, expected.state)]:
            if got.keys() != want.keys():
                found.append(f"rank {rank}: {what} has {sorted(got.keys() ^ want.keys())}")
                continue
            for name in got:
                error = (got[name] - want[name]).norm() / want[name].norm()
                if not error < RELATIVE:
                    found.append(f"rank {rank}: {what} {name}: relative error {error:.1e}")
    return found


@pytest.mark.parametrize("layout", ["tp2", "pp2"])
@pytest.mark.parametrize("name", RUNS)
def test_gradients_and_adapter_match_the_unsharded_run(name: str, layout: str) -> None:
    assert differences(records(layout)[name], oracle(name)) == []


@pytest.mark.parametrize("fault", FAULTS)
def test_parity_fails_when_the_pipeline_sum_or_the_optimizer_is_wrong(fault: str) -> None:
    assert differences(records("pp2")[fault], oracle("tl6"))


@pytest.mark.parametrize("layout", ["tp2", "pp2"])
def test_replicas_hold_the_same_bits_after_training(layout: str) -> None:
    ranks = records(layout)["tl6"]
    replicated = {"tp2": ["linear_qkv.A", "linear_fc1.A", "linear_proj.B", "linear_fc2.B", "layers.1.linear_qkv.u"]}
    names = replicated.get(layout, [f"{target}.{factor}" for target in ALL for factor in "AB"])
    assert [name for name in names if ranks[0].local_bits[name] != ranks[1].local_bits[name]] == []
