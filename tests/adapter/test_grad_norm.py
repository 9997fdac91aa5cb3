# SPDX-License-Identifier: Apache-2.0
"""One process and two ranks: the norm of the whole gradient, and clipping by it.

tests/parity compares the norm with the single process's on every layout, in each step.
"""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from megatron.core import parallel_state
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads

from nemo_tied_lora import TiedLoraConfig, inject
from tests.adapter.test_inject import loss_of
from tests.harness.ranks import run_ranks, single_process
from tests.harness.tiny_gpt import build_gpt
from tests.parity.layouts import LAYOUTS
from tests.parity.runs import Run
from tests.parity.training import _forward_backward, build_chunks, randomise

RUN = Run(config={"preset": "tl6", "rank": 3})


def trained_model() -> tuple[Any, list[torch.nn.Parameter]]:
    """An adapter with gradients, and its parameters."""
    model = build_gpt(num_layers=2)
    adapter = inject(model, TiedLoraConfig(rank=3))
    randomise(adapter)
    loss_of(model).backward()
    return adapter, list(adapter.parameters())


@pytest.mark.parametrize("norm_type", [2, math.inf])
@pytest.mark.parametrize("max_norm", [0.01, 1e6, math.inf])
def test_on_one_process_it_is_torchs_norm_and_torchs_clipping(norm_type: float, max_norm: float) -> None:
    single_process()
    adapter, parameters = trained_model()
    _, others = trained_model()
    want = torch.nn.utils.clip_grad_norm_(others, max_norm, norm_type)
    assert float(adapter.gradient_norm(norm_type)) == pytest.approx(float(want), rel=1e-12)
    assert float(adapter.clip_gradients(max_norm, norm_type)) == pytest.approx(float(want), rel=1e-12)
    for parameter, other in zip(parameters, others, strict=True):
        torch.testing.assert_close(parameter.grad, other.grad, rtol=1e-12, atol=0)


def test_main_grad_is_read_where_grad_is_none() -> None:
    single_process()
    adapter, parameters = trained_model()
    want = float(adapter.gradient_norm())
    for parameter in parameters:
        parameter.main_grad, parameter.grad = parameter.grad.float(), None  # type: ignore[attr-defined,union-attr]
    assert float(adapter.clip_gradients(want / 2)) == pytest.approx(want, rel=1e-6)
    assert float(adapter.gradient_norm()) == pytest.approx(want / 2, rel=1e-5)


def test_gradients_that_are_not_finite_and_wrong_arguments() -> None:
    single_process()
    adapter, parameters = trained_model()
    for value in (math.nan, math.inf, -math.inf):
        parameters[3].grad.view(-1)[0] = value  # type: ignore[union-attr]
        norm = float(adapter.gradient_norm())
        assert math.isnan(norm) if math.isnan(value) else norm == math.inf
        before = [p.grad.clone() for p in parameters]  # type: ignore[union-attr]
        with pytest.raises(RuntimeError, match=f"the norm of the gradients is {norm}, so they cannot be clipped"):
            adapter.clip_gradients(1.0, error_if_nonfinite=True)
        for parameter, kept in zip(parameters, before, strict=True):
            torch.testing.assert_close(parameter.grad, kept, rtol=0, atol=0, equal_nan=True)
    for wrong in (0.0, -1.0, math.nan):
        with pytest.raises(ValueError, match=r"max_norm=.*: must be greater than 0"):
            adapter.clip_gradients(wrong)
    with pytest.raises(ValueError, match="norm_type=1: must be 2 or infinity"):
        adapter.gradient_norm(1)
    for parameter in parameters:
        parameter.grad = None
    assert float(adapter.clip_gradients(1.0)) == 0.0


def _on_a_rank() -> dict[str, dict[str, Any]]:
    results: dict[str, dict[str, Any]] = {}
    for name in ("tp2", "tp2 sp", "pp2", "dp2"):
        LAYOUTS[name].enter()
        chunks = build_chunks(RUN, LAYOUTS[name].sequence_parallel)
        adapter = inject(chunks, TiedLoraConfig.from_mapping(RUN.config))
        randomise(adapter)
        _forward_backward(chunks, RUN, 0, forward_only=False)
        adapter.reduce_gradients()
        found: dict[str, Any] = {}
        if name == "dp2":
            try:
                adapter.clip_gradients(0.1)
            except RuntimeError as error:
                found["refused"] = str(error)
            for parameter in adapter.parameters():
                assert parameter.grad is not None
                torch.distributed.all_reduce(parameter.grad, group=parallel_state.get_data_parallel_group())
                parameter.grad.div_(2)
        found["norms"] = [float(adapter.gradient_norm(kind)).hex() for kind in (2, math.inf)]
        found["torch"] = float(torch.nn.utils.get_total_norm([p.grad for p in adapter.parameters()]))
        adapter.clip_gradients(0.01)
        found["clipped"] = float(adapter.gradient_norm())
        results[name] = found
    results["dp2"]["distributed"] = _distributed_optimizer()
    return results


def _distributed_optimizer() -> tuple[str, str]:
    """The norm, or the refusal, with Megatron's distributed optimizer and with plain DDP."""
    found: list[str] = []
    for distributed in (True, False):
        (chunk,) = build_chunks(RUN)
        adapter = inject(chunk, TiedLoraConfig.from_mapping(RUN.config))
        randomise(adapter)
        ddp = DistributedDataParallelConfig(use_distributed_optimizer=distributed)
        wrapped = DistributedDataParallel(chunk.config, ddp, chunk)
        _forward_backward([wrapped], RUN, 0, forward_only=False)
        finalize_model_grads([wrapped])
        try:
            found.append(float(adapter.gradient_norm()).hex())
        except RuntimeError as error:
            found.append(str(error))
        wrapped.grad_accs.clear()
    return found[0], found[1]


def test_on_two_ranks_it_is_the_single_process_norm_and_torchs_is_not() -> None:
    single_process()
    chunks = build_chunks(RUN)
    adapter = inject(chunks, TiedLoraConfig.from_mapping(RUN.config))
    randomise(adapter)
    _forward_backward(chunks, RUN, 0, forward_only=False)
    want = [float(adapter.gradient_norm(kind)) for kind in (2, math.inf)]
    first, second = run_ranks(_on_a_rank, world_size=2)
    for name in first:
        assert first[name]["norms"] == second[name]["norms"], "the same bits"
        got = [float.fromhex(norm) for norm in first[name]["norms"]]
        assert got == pytest.approx(want, rel=1e-9), name
        assert first[name]["clipped"] == pytest.approx(0.01, rel=1e-3)
        wrong = [abs(rank[name]["torch"] / want[0] - 1) for rank in (first, second)]
        assert (max(wrong) > 1e-3) == (name != "dp2"), name
    for rank in (first, second):
        assert "data-parallel ranks hold different gradients" in rank["dp2"]["refused"]
        assert rank["dp2"]["refused"] == first["dp2"]["refused"]
        refused, norm = rank["dp2"]["distributed"]
        assert "set OptimizerConfig.clip_grad" in refused
        assert float.fromhex(norm) == pytest.approx(want[0], rel=1e-9)
