# SPDX-License-Identifier: Apache-2.0
"""Four ranks (one start): switches off each flag that Megatron reads from the adapter, and sees its check fail."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import pytest

from tests.adapter.flag_checks import (
    CHECKS,
    Off,
    Trained,
    fused_gradients,
    nothing,
    replica_id,
    train,
    without,
    without_config,
)
from tests.harness.ranks import run_ranks, single_process
from tests.harness.relayout import relayout

ALL = ("linear_qkv", "linear_proj", "linear_fc1", "linear_fc2")
TIED = {f"{target}.{factor}" for target in ALL for factor in "AB"}
SUMMED_OVER_SEQUENCE = {
    *(name for name in TIED if name in {"linear_qkv.A", "linear_fc1.A", "linear_proj.B", "linear_fc2.B"}),
    *(f"layers.{layer}.{target}.u" for layer in range(4) for target in ALL),
    *(f"layers.{layer}.{target}.v" for layer in range(4) for target in ("linear_proj", "linear_fc2")),
}
ROWS = {"linear_proj.A", "linear_fc2.A"}
GATED = {"linear_fc1.B", *(f"layers.{layer}.linear_fc1.v" for layer in range(4))}
PIPELINE, SEQUENCE = "training, two unequal stages", "training, sequence parallel"
STAGES, TENSOR = "checkpoint, two stages", "checkpoint, tensor parallel"
TWICE = {"Invalid access pattern"}


@dataclass(frozen=True)
class Control:
    """check: a name in CHECKS. off: switches the flag off. wrong: exactly the names that are wrong then.

    some: some of these names are enough, because which ones depends on sizes.
    """

    check: str
    off: Off
    wrong: set[str]
    some: bool = False


CONTROLS = {
    "pipeline_parallel": Control(PIPELINE, without("pipeline_parallel"), TIED | {"norm"}),
    "has_cond_embedder of the config": Control(PIPELINE, without_config("has_cond_embedder"), TIED | {"norm"}),
    "shared_embedding": Control(PIPELINE, without("shared_embedding"), TIED | {"norm"}, some=True),
    "shared": Control(PIPELINE, without("shared"), {"norm"}),
    "tensor_model_parallel": Control(SEQUENCE, without("tensor_model_parallel"), {"norm"}),
    "sequence_parallel": Control(SEQUENCE, without("sequence_parallel"), SUMMED_OVER_SEQUENCE | {"norm"}),
    "replica_id's chunk": Control(STAGES, replica_id(0), TWICE),
    "replica_id's tensor-parallel rank": Control(TENSOR, replica_id(1), TWICE),
    "replica_id's data-parallel rank": Control(STAGES, replica_id(2), TWICE),
    "partition_dim": Control("Megatron's partition", without("partition_dim"), ROWS),
    "partition_stride": Control("Megatron's partition", without("partition_stride"), GATED),
}


def on_a_rank() -> dict[str, Any]:
    """Runs every check with all flags on, and with each flag off."""
    found: dict[str, Any] = {}
    for layout in ({"pp": 2}, {"tp": 2}):
        relayout(**layout)
        for name, (sizes, check) in CHECKS.items():
            if sizes == layout:
                found[name] = check(nothing)
                found |= {flag: check(one.off) for flag, one in CONTROLS.items() if one.check == name}
    return found


@functools.cache
def outcomes() -> list[dict[str, Any]] | AssertionError:
    """The results of each rank. The ranks are started once, even if they fail."""
    try:
        return run_ranks(on_a_rank, world_size=4)
    except AssertionError as failure:
        return failure


@functools.cache
def single() -> Trained:
    single_process()
    return train(nothing)


def wrong(name: str) -> set[str]:
    """The names that are wrong on any rank."""
    ranks = outcomes()
    if isinstance(ranks, AssertionError):
        raise ranks
    found: set[str] = set()
    for rank in ranks:
        found |= set(differences(rank[name]) if isinstance(rank[name], dict) else rank[name])
    return found


def differences(got: Trained) -> list[str]:
    """Reordered float32 sums differ by 1e-5; the errors that a flag prevents are at least 10%."""
    want = single()
    found = [] if got["norm"] == pytest.approx(want["norm"], rel=1e-3) else ["norm"]
    for name, change in want["changes"].items():
        if not (got["changes"][name] - change).norm() <= 1e-3 * change.norm():
            found.append(name)
    return found


@pytest.mark.parametrize("check", CHECKS)
def test_with_every_flag_the_check_passes(check: str) -> None:
    assert wrong(check) == set()


@pytest.mark.parametrize("flag", CONTROLS)
def test_without_the_flag_its_check_fails(flag: str) -> None:
    control, found = CONTROLS[flag], wrong(flag)
    if control.some:
        assert found
        assert found <= control.wrong
    else:
        assert found == control.wrong


def test_a_tied_factor_in_a_fused_kernel_needs_zero_out_wgrad() -> None:
    """Only GPU kernels read this flag, so their code runs around a stand-in here."""
    single_process()
    assert fused_gradients(nothing) == []
    assert fused_gradients(without("zero_out_wgrad")) == ["linear_qkv.A"]
