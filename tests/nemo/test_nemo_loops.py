# SPDX-License-Identifier: Apache-2.0
"""Several ranks: each of NeMo's training loops on two ranks trains the same adapter as one process. The ranks start once.

All fits use float32, except O2, which NeMo has only in bfloat16. The tests compare the change of each tensor in the steps. The
relative error of an untrained tensor is 1, and that of a tensor trained on a part of its gradient is about 1. Tolerances:
- 1e-4 in float32: reordered sums cause at most 3e-6 (measured), because Adam divides by small second moments.
- 4e-1 in bfloat16: its 8 bits cause 4e-3 per product, and each layout rounds other sums. If an element's gradient is that
  small, Adam may step in either direction, at full size. The error of a u of 4 elements is then up to 0.23, that of any
  other tensor up to 0.08.
"""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import torch

from nemo_tied_lora import ConfigError, check_ddp
from nemo_tied_lora.planning.settings.training_loop_checks import check_loop
from tests.nemo.nemo_fits import LOOPS, MULTIPLIERS, UNSUMMED, FitRecord, fit_records
from tests.parity.cells import NEMO_TOLERANCES

OVERLAP_AND_FULL = "mcore dp2 overlap full recompute"
LAYOUTS = ("tp2", "pp2", "dp2")
RECOMPUTES = ("tp2 full recompute", "pp2 full recompute", "pp2 selective recompute", "tp2 sequence parallel")


def close(got: FitRecord, want: FitRecord, loop: str) -> list[str]:
    """One line per difference between two fits: in a loss, a norm, or the movement of a tensor."""
    found = []
    for name in ("reduced_train_loss", "grad_norm"):
        series = [[step[name] for step in fit.steps if name in step] for fit in (got, want)]
        rtol = 3e-2 if loop == "O2" else 1e-5
        if series[0] and not torch.allclose(*map(torch.tensor, series), rtol=rtol, atol=0):
            found.append(f"{name}: {series[0]} is not {series[1]}")
    if got.state.keys() != want.state.keys():
        return [*found, f"tensors {sorted(got.state.keys() ^ want.state.keys())}"]
    for name, tensor in got.state.items():
        change = want.state[name] - want.start[name]
        error = float((tensor - got.start[name] - change).norm() / change.norm())
        if not error <= NEMO_TOLERANCES[loop]:
            found.append(f"{name}: relative error {error:.1e} of its change")
    return found


def ranks_of(name: str) -> list[FitRecord]:
    ranks = [records[name] for records in fit_records(2)]
    assert [rank.failure for rank in ranks] == [None, None], ranks[0].traceback or ranks[1].traceback
    return ranks


def oracle(name: str) -> FitRecord:
    record = fit_records(1)[0][name]
    assert record.failure is None, record.traceback
    return record


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("loop", LOOPS)
def test_the_loop_gives_the_single_process_adapter(loop: str, layout: str) -> None:
    for record in ranks_of(f"{loop} {layout}"):
        assert close(record, oracle(loop), loop) == []


@pytest.mark.parametrize("loop", LOOPS)
def test_five_steps_move_every_compared_tensor(loop: str) -> None:
    fit = oracle(loop)
    assert len(fit.steps) == 5
    assert [name for name, tensor in fit.state.items() if torch.equal(tensor, fit.start[name])] == []


@pytest.mark.parametrize("name", UNSUMMED)
def test_without_the_sum_over_stages_the_adapter_differs(name: str) -> None:
    """Each tensor that the stages share differs."""
    loop = name.split()[0]
    for record in ranks_of(f"{name}, unsummed"):
        different = {line.split(":")[0] for line in close(record, oracle(loop), loop)}
        assert different >= {name for name in record.state if not name.startswith("layers.")}


@pytest.mark.parametrize("name", [*LOOPS, *(f"{loop} {layout}" for loop in LOOPS for layout in LAYOUTS)])
def test_adams_first_step_has_the_size_of_each_factors_rate(name: str) -> None:
    """Adam's first step moves an element by its rate, whatever its gradient is, unless that is 0."""
    fit = oracle(name) if name in LOOPS else ranks_of(name)[0]
    rate = 1e-2 / 2  # of the first of two steps of warm-up
    for name_, tensor in fit.first_step.items():
        factor = name_.rpartition(".")[2]
        expected = rate * MULTIPLIERS.get(factor, 1)
        moved = float((tensor - fit.start[name_]).abs().mean())
        assert math.isclose(moved, expected, rel_tol=0.3 if name.startswith("O2") else 0.02), (name_, moved, expected)


def test_the_log_has_the_schedules_rate_and_each_factors() -> None:
    for name in LOOPS:
        steps = oracle(name).summary["steps"]
        for step in steps:
            assert step["lr_u"] == step["lr"]
            for factor, multiplier in MULTIPLIERS.items():
                assert math.isclose(step[f"lr_{factor}"], step["lr"] * multiplier, rel_tol=1e-6)  # logged in float32
        assert len({step["lr"] for step in steps}) > 3


def test_distributed_optimizer_agrees_with_plain_adam() -> None:
    assert close(oracle("mcore"), oracle("O1"), "mcore") == []


@pytest.mark.parametrize("name", RECOMPUTES)
def test_recomputation_and_sequence_parallelism_change_nothing(name: str) -> None:
    for record in ranks_of(f"O1 {name}"):
        assert close(record, oracle("O1"), "O1") == []


@pytest.mark.parametrize("loop", ["O2", "mcore"])
def test_recomputation_changes_nothing_in_the_other_loops(loop: str) -> None:
    for record in ranks_of(f"{loop} dp2 full recompute"):
        assert close(record, oracle(loop), loop) == []


def test_overlapped_gathers_finish_before_the_forward_pass_needs_them() -> None:
    for record in ranks_of("mcore dp2 overlap"):
        assert close(record, oracle("mcore"), "mcore") == []


@pytest.mark.parametrize("name", [f"{loop} {layout}" for loop in LOOPS for layout in LAYOUTS] + ["mcore dp2 overlap"])
def test_replicas_hold_the_same_bits(name: str) -> None:
    first, second = ranks_of(name)
    replicated = {
        "tp2": ["linear_qkv.A", "linear_fc1.A", "linear_proj.B", "layers.1.linear_qkv.u", "layers.2.linear_fc2.v"],
        "pp2": ["linear_qkv.A", "linear_qkv.B", "linear_fc2.A", "linear_fc2.B"],
        "dp2": [key.removeprefix("0 ") for key in first.local_bits],
    }[name.split()[1]]
    assert [n for n in replicated if first.local_bits[f"0 {n}"] != second.local_bits[f"0 {n}"]] == []


@pytest.mark.parametrize("name", ["O1 pp2", "mcore dp2"])
def test_a_rank_budget_chooses_the_single_process_entries(name: str) -> None:
    """The scores are those of clipped gradients: in each of the loops, clipping comes at another place."""
    want = oracle("O1 budget")
    assert sum(map(sum, want.masks.values())) == 2 * 16
    for record in ranks_of(f"{name} budget"):
        assert record.masks == want.masks
        assert record.observed == 5
        assert close(record, want, name.split()[0]) == []


def test_in_o2_the_ranks_choose_alike() -> None:
    """bfloat16 rounds other sums on another layout, so the entries need not be the single process's."""
    first, second = ranks_of("O2 tp2 budget")
    assert first.masks == second.masks
    assert sum(map(sum, first.masks.values())) == 2 * 16


def test_a_rank_budget_does_not_see_a_skipped_step() -> None:
    for record in ranks_of("skip budget"):
        assert [step["skipped"] is not None for step in record.steps] == [False, True, False, False, False]
        assert record.observed == 4
        assert sum(map(sum, record.masks.values())) == 2 * 16


REFUSED = {
    "distributed_fused_adam": ({"optim": {"name": "distributed_fused_adam"}}, "use mcore_distributed_optim"),
    "O2 with context parallelism": (
        {"megatron_amp_O2": True, "context_parallel_size": 2, "optim": {"name": "fused_adam"}},
        "context_parallel_size=2",
    ),
    "a float32 adapter in O2": (
        {
            "megatron_amp_O2": True,
            "optim": {"name": "fused_adam"},
            "peft": {"peft_scheme": "tied_lora", "tied_lora": {"dtype": "float32"}},
        },
        r"model\.peft\.tied_lora\.dtype=float32: not possible with megatron_amp_O2=true",
    ),
    "overlap with full recomputation": (
        {
            "activations_checkpoint_granularity": "full",
            "optim": {"name": "mcore_distributed_optim", "overlap_grad_sync": True},
        },
        "Cannot set grad twice",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_nemo_cannot_do_is_refused_by_name(case: str) -> None:
    model, message = REFUSED[case]
    with pytest.raises(ConfigError, match=message):
        check_loop(model)


def test_each_half_of_a_refused_pair_is_allowed() -> None:
    float32 = {"peft": {"peft_scheme": "tied_lora", "tied_lora": {"dtype": "float32"}}}
    check_loop({**float32, "optim": {"name": "fused_adam"}})
    check_loop({**float32, "megatron_amp_O2": True, "optim": {"name": "mcore_distributed_optim"}})
    check_loop({"megatron_amp_O2": True, "optim": {"name": "fused_adam"}})
    check_loop({"megatron_amp_O2": True, "context_parallel_size": 2, "optim": {"name": "mcore_distributed_optim"}})
    check_loop({"activations_checkpoint_granularity": "full", "optim": {"name": "mcore_distributed_optim"}})
    check_loop({"optim": {"name": "mcore_distributed_optim", "overlap_grad_sync": True}})


def test_an_adapter_stays_in_float32_on_a_bfloat16_base() -> None:
    fit = oracle("float32 adapter")
    for name, tensor in fit.state.items():
        assert len(fit.local_bits[f"0 {name}"]) == 4 * tensor.numel(), name
        assert not torch.equal(tensor, tensor.bfloat16().float()), name
        assert not torch.equal(tensor, fit.start[name]), name


def test_an_adapter_whose_file_asks_for_float32_is_refused_in_o2_as_well() -> None:
    """The run's configuration, which is checked first, need not say so."""
    failure = fit_records(1)[0]["float32 adapter in O2, unchecked"].failure
    assert failure is not None
    assert failure.startswith("ConfigError: tied_lora.dtype=float32: not possible with megatron_amp_O2=true")


def test_nemos_own_loop_would_fail_with_overlap_and_full_recomputation() -> None:
    """The reason for the refusal. If this no longer fails, remove the refusal."""
    failures = [records[f"{OVERLAP_AND_FULL}, unguarded"].failure for records in fit_records(2)]
    assert all(failure is not None and "AssertionError: Cannot set grad twice" in failure for failure in failures)


def test_nemos_model_refuses_the_adapter_in_such_a_loop() -> None:
    """`add_adapter` refuses, because a user's own script has no pre-flight."""
    for records in fit_records(2):
        record = records[OVERLAP_AND_FULL]
        assert str(record.failure).startswith("ConfigError: model.optim.overlap_grad_sync=true: not possible")
        assert "in add_adapter" in record.traceback


def test_nemo_itself_builds_no_interleaved_model() -> None:
    """The reason for a refusal in the pre-flight. If this no longer fails, test interleaving."""
    failure = fit_records(1)[0]["interleaved"].failure
    assert failure == "AssertionError: Virtual pipeline model parallel size is no longer supported for nemo 1.0"


def test_your_own_loop_is_refused_before_it_wraps_the_model() -> None:
    """The configs have only the fields that the check reads."""
    overlap, plain = SimpleNamespace(overlap_grad_reduce=True), SimpleNamespace(overlap_grad_reduce=False)
    injected = {"has_cond_embedder": True}
    full = SimpleNamespace(recompute_granularity="full", recompute_modules=None, **injected)
    mlp = SimpleNamespace(recompute_granularity="selective", recompute_modules=["mlp"], **injected)
    core = SimpleNamespace(recompute_granularity="selective", recompute_modules=["core_attn"], **injected)
    for recompute in (full, mlp):
        with pytest.raises(ConfigError, match="overlap_grad_reduce=True: not possible with recompute_granularity"):
            check_ddp(recompute, overlap)
        check_ddp(recompute, plain)
    check_ddp(core, overlap)
