# SPDX-License-Identifier: Apache-2.0
"""Several ranks: the guards in real fits on two ranks, started once. Settings and messages are tested in one process."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import nn

from nemo_tied_lora.adapter.nonfinite_grads import find_nonfinite
from nemo_tied_lora.errors import ConfigError
from nemo_tied_lora.planning.composing.compose import compose_config
from nemo_tied_lora.planning.settings.run_settings import MOST_SKIPPED_IN_A_ROW, GuardSettings
from tests.harness.ranks import single_process
from tests.nemo.nemo_fits import LOOPS, UNGUARDED, FitRecord, fit_records


def on_both_ranks(name: str) -> list[FitRecord]:
    return [records[name] for records in fit_records(2)]


def check_skip(name: str, ranks: list[FitRecord]) -> None:
    tensor = "linear_qkv.A" if name == "skip dp2" else "layers.3.linear_fc1.u"
    assert [rank.failure for rank in ranks] == [None, None], ranks[0].traceback
    for rank in ranks:
        assert rank.untouched == [False, True, False]
        assert [step["skipped"] is not None for step in rank.steps] == [False, True, False]
        assert rank.steps[1]["skipped"] == ranks[0].steps[1]["skipped"]
        assert rank.summary["skipped_steps"] == 1
        assert [step.get("skipped") for step in rank.summary["steps"]] == [None, tensor, None]
    message = ranks[0].steps[1]["skipped"]
    where = "shared by all layers" if name == "skip dp2" else "layer 3"
    rank_named = 0 if name == "skip dp2" else 1
    assert message == f"the gradient of {tensor} ({where}) holds NaN or infinity on rank {rank_named}"


@pytest.mark.parametrize("name", [f"skip {loop}" for loop in LOOPS] + ["skip dp2"])
def test_a_nan_on_one_rank_skips_the_step_on_all_ranks(name: str) -> None:
    check_skip(name, on_both_ranks(name))


def check_stop(name: str, ranks: list[FitRecord]) -> None:
    assert ranks[0].failure == ranks[1].failure
    assert str(ranks[0].failure).startswith(
        "TrainingStopped: step 2: the gradient of layers.1.linear_proj.v (layer 1)"
    )
    assert "on rank 0" in str(ranks[0].failure)
    assert [(rank.global_step, rank.files) for rank in ranks] == [(1, []), (1, [])]


def test_by_default_every_rank_stops_with_the_tensors_name_and_nothing_is_saved() -> None:
    check_stop("stop", on_both_ranks("stop"))


def test_too_many_skipped_steps_in_a_row_stop_the_run() -> None:
    ranks = on_both_ranks("ten in a row")
    assert ranks[0].failure == ranks[1].failure
    assert f"{MOST_SKIPPED_IN_A_ROW} steps in a row skipped" in str(ranks[0].failure)


DRIFTS = {
    "drift tp2": ("linear_fc1.A", "after step 2"),
    "drift dp2": ("layers.2.linear_qkv.v", "after step 2"),
    "drift before a checkpoint": ("linear_qkv.A", "before the checkpoint of step 2"),
    "drift before the file": ("linear_qkv.A", "before drift before the file.nemo was written"),
}


def check_drift(name: str, ranks: list[FitRecord]) -> None:
    tensor, step = DRIFTS[name]
    assert ranks[0].failure == ranks[1].failure
    message = str(ranks[0].failure)
    assert message.startswith(f"TieError: tie guard: {step}: 1 tensor(s) differ")
    assert f"{tensor}: checksum " in message
    assert "on rank 0; " in message
    assert "on rank 1" in message
    assert [rank.files for rank in ranks] == [[], []]


@pytest.mark.parametrize("name", DRIFTS)
def test_replicas_that_drift_apart_stop_every_rank_before_anything_is_written(name: str) -> None:
    check_drift(name, on_both_ranks(name))


@pytest.mark.parametrize("name", UNGUARDED)
def test_without_the_guard_the_same_check_fails(name: str) -> None:
    check = {"stop": check_stop, "skip": check_skip, "drift": check_drift}[name.split()[0]]
    with pytest.raises(AssertionError):
        check(name, on_both_ranks(f"{name}, unguarded"))


def test_zero_turns_the_tie_guard_off() -> None:
    for rank in on_both_ranks("drift, guard off"):
        assert rank.failure is None
        assert rank.files == ["drift, guard off.nemo"]


def gradients(**values: list[float]) -> dict[str, nn.Parameter]:
    named = {}
    for name, gradient in values.items():
        parameter = nn.Parameter(torch.zeros(len(gradient)))
        parameter.grad = torch.tensor(gradient)
        named[name.replace("__", ".")] = parameter
    return named


def test_the_tensor_nearest_to_the_cause_is_named() -> None:
    single_process()
    nan, inf, largest = float("nan"), float("inf"), torch.finfo(torch.float32).max
    healthy = gradients(linear_qkv__A=[1.0, largest], layers__0__linear_fc2__u=[-largest, -largest])
    assert find_nonfinite(healthy.items()) is None
    assert find_nonfinite([]) is None
    broken = gradients(
        linear_qkv__A=[1.0, nan], layers__0__linear_fc2__u=[inf], layers__10__linear_qkv__u=[-inf], layers__9__v=[nan]
    )
    found = find_nonfinite(broken.items())
    assert found is not None
    assert (found.name, found.layer, found.ranks, found.tensors) == ("layers.10.linear_qkv.u", 10, (0,), 4)
    assert str(found).endswith("(layer 10) holds NaN or infinity on rank 0, and of 3 more tensor(s)")


def test_gradients_in_main_grad_are_checked_and_missing_ones_are_allowed() -> None:
    single_process()
    parameter = nn.Parameter(torch.zeros(2))
    assert find_nonfinite([("u", parameter)]) is None
    parameter.main_grad = torch.tensor([0.0, float("inf")])
    found = find_nonfinite([("u", parameter), ("v", nn.Parameter(torch.zeros(1, dtype=torch.float64)))])
    assert found is not None
    assert (found.name, found.layer) == ("u", None)
    wide = nn.Parameter(torch.zeros(1, dtype=torch.float64))
    wide.grad = torch.tensor([1e300], dtype=torch.float64)  # finite in float64, but not in float32
    parameter.main_grad.zero_()
    assert find_nonfinite([("u", parameter), ("v", wide)]) is None


def test_wrong_settings_are_refused_together() -> None:
    with pytest.raises(ConfigError) as refused:
        GuardSettings.from_mapping({"tie_guard_every_n_steps": -1, "nonfinite_gradients": "ignore"})
    assert len(refused.value.problems) == 2
    with pytest.raises(ConfigError, match="tie_guard_every_n_steps, nonfinite_gradients"):
        GuardSettings.from_mapping({"tie_guard": 5})
    with pytest.raises(ConfigError, match="section"):
        GuardSettings.from_mapping(5)  # type: ignore[arg-type]
    assert GuardSettings.from_mapping(None) == GuardSettings.from_mapping({"nonfinite_gradients": None})


def test_the_yaml_states_the_defaults() -> None:
    for command in ("finetune", "pretrain"):
        stated = compose_config(command, []).guards
        assert GuardSettings.from_mapping(stated) == GuardSettings()
        assert list(stated) == [field.name for field in dataclasses.fields(GuardSettings)]
