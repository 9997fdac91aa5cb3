# SPDX-License-Identifier: Apache-2.0
"""One process, then two ranks (one start): which code sums which gradient, with and without Megatron's DDP."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from megatron.core import parallel_state
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from megatron.core.pipeline_parallel import get_forward_backward_func
from torch import nn

from nemo_tied_lora import TiedLoraConfig, inject
from nemo_tied_lora.adapter.grad_allreduce import reduce_over_pipeline, reduce_over_tensor_parallel
from nemo_tied_lora.adapter.injected_adapter import Adapter
from nemo_tied_lora.config import TARGETS
from tests.harness.ranks import run_ranks, single_process
from tests.harness.relayout import relayout
from tests.harness.tiny_gpt import SEQUENCE, VOCAB, build_gpt, full_tensor
from tests.parity.runs import Run
from tests.parity.training import Record, randomise, train

# Sums are only reordered: float64 leaves about 1e-13.
RELATIVE = 1e-9
MICROBATCHES = 2

CONFIGS: dict[str, dict[str, Any]] = {
    "tl6": {"preset": "tl6", "rank": 3},
    "vera": {"preset": "vera", "rank": 3},
    "last stage's layers": {"preset": "tl6", "rank": 3, "layers": [3], "targets": ["linear_qkv"]},
}
# What is done to Megatron's own loop (as it is, tests/parity has it); the two last are errors that the comparison must notice.
LOOPS = ("reduced again", "flag off", "not finalized")

Gradients = dict[str, torch.Tensor]


def batches() -> Any:
    generator = torch.Generator().manual_seed(7)
    for _ in range(MICROBATCHES):
        yield torch.randint(0, VOCAB, (3, SEQUENCE + 1), generator=generator)


def forward_step(data: Any, model: nn.Module) -> tuple[torch.Tensor, Callable[..., Any]]:
    tokens = next(data)
    positions = torch.arange(SEQUENCE).expand(3, SEQUENCE)
    mask = torch.ones(SEQUENCE, SEQUENCE, dtype=torch.bool).triu(1)[None, None]
    return model(tokens[:, :-1], positions, mask), partial(loss, tokens[:, 1:])


def loss(labels: torch.Tensor, logits: torch.Tensor) -> tuple[torch.Tensor, dict]:
    return nn.functional.cross_entropy(logits.reshape(-1, VOCAB), labels.reshape(-1)), {}


def forward_and_backward(model: nn.Module) -> None:
    get_forward_backward_func()(
        forward_step_func=forward_step,
        data_iterator=batches(),
        model=model,
        num_microbatches=MICROBATCHES,
        seq_length=SEQUENCE,
        micro_batch_size=3,
        forward_only=False,
    )


def with_megatrons_ddp(name: str, loop: str) -> Gradients:
    """On a rank: the gradients after `finalize_model_grads`. DDP gets the config that built the model."""
    model = build_gpt()
    callers_own_config = model.config
    adapter = inject(model, TiedLoraConfig.from_mapping(CONFIGS[name]))
    randomise(adapter)
    if loop == "flag off":
        callers_own_config.has_cond_embedder = False
    wrapped = DistributedDataParallel(callers_own_config, DistributedDataParallelConfig(), model)
    wrapped.zero_grad_buffer()
    forward_and_backward(wrapped)
    if loop != "not finalized":
        finalize_model_grads([wrapped])
    if loop == "reduced again":
        adapter.reduce_gradients()
    return {name: p.main_grad.clone() for name, p in adapter.named_parameters()}  # type: ignore[attr-defined]


def count_all_reduces() -> dict[str, int]:
    """On a rank: the number of elements of each all-reduce that `reduce_gradients` starts."""
    model = build_gpt()
    adapter = inject(model, TiedLoraConfig(rank=3))
    randomise(adapter)
    forward_and_backward(model)
    sizes: list[int] = []
    original = torch.distributed.all_reduce

    def counting(tensor: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        sizes.append(tensor.numel())
        return original(tensor, *args, **kwargs)

    torch.distributed.all_reduce = counting
    try:
        adapter.reduce_gradients()
    finally:
        torch.distributed.all_reduce = original
    return {"calls": len(sizes), "elements": sum(sizes)}


def sum_marked_over_tensor_parallel() -> list[list[float]]:
    """On a rank: the gradients after the sum of three parameters: marked, not marked, marked without a gradient."""
    parameters = [nn.Parameter(torch.zeros(2)) for _ in range(3)]
    for parameter, marked in zip(parameters, (True, False, True), strict=True):
        parameter.sequence_parallel = marked  # type: ignore[attr-defined]
    rank = parallel_state.get_tensor_model_parallel_rank()
    parameters[0].grad = torch.tensor([1.0, 10.0 * rank])
    parameters[1].grad = torch.tensor([1.0, 10.0 * rank])
    if rank == 0:
        parameters[2].grad = torch.tensor([3.0, 4.0])
    reduce_over_tensor_parallel(parameters, "grad")
    return [p.grad.tolist() for p in parameters]  # type: ignore[union-attr]


def dropout_masks() -> dict[str, list[float]]:
    """On a rank: the result of dropout on ones, for each kind of linear, with and without sequence parallelism.

    Like Megatron, it seeds the default generator alike on all tensor-parallel ranks.
    """
    masks = {}
    for sequence_parallel in (False, True):
        adapter = inject(build_gpt(num_layers=1, sequence_parallel=sequence_parallel), TiedLoraConfig(dropout=0.5))
        for linear in adapter.chunks[0].linears:
            torch.manual_seed(11)
            mask = linear.module.tied_lora.dropped_out(torch.ones(64))  # type: ignore[operator,union-attr]
            masks[f"{linear.kind}{', sequence' if sequence_parallel else ''}"] = mask.tolist()
    return masks


SEQUENCE_PARALLEL = {"config": {"preset": "tl6", "rank": 3, "alpha": 5.0}, "steps": 1, "microbatches": 2}


def on_a_rank() -> dict[str, Any]:
    results: dict[str, Any] = {}
    relayout(pp=2)
    results["ddp"] = {(name, loop): with_megatrons_ddp(name, loop) for name in CONFIGS for loop in LOOPS}
    results["all-reduces"] = count_all_reduces()
    relayout(tp=2)
    results["marked"] = sum_marked_over_tensor_parallel()
    results["dropout"] = dropout_masks()
    results["sequence, no sum"] = train(Run(**SEQUENCE_PARALLEL, fault="no sum"), sequence_parallel=True)
    return results


@pytest.fixture(scope="module")
def two_ranks() -> list[dict[str, Any]]:
    """The ranks are started once, even if they fail."""
    return run_ranks(on_a_rank, world_size=2, pp=2)


@pytest.fixture(autouse=True)
def megatron() -> None:
    single_process()


def two_chunks(**options: Any) -> Adapter:
    """One stage of two chunks with two layers each."""
    chunks = [build_gpt(num_layers=2), build_gpt(num_layers=2)]
    for layer in chunks[1].decoder.layers:
        layer.layer_number += 2
    for chunk in chunks:
        chunk.config.num_layers = 4
    return inject(chunks, TiedLoraConfig(rank=3, **options))


def tied(adapter: Adapter) -> list[dict[str, nn.Parameter]]:
    return [{str(n): p for n, p in chunk.factors.named_factors() if n.layer is None} for chunk in adapter.chunks]


def test_chunks_of_a_stage_get_the_sum_and_one_without_a_gradient_adds_nothing() -> None:
    adapter = two_chunks()
    first, second = tied(adapter)
    for name, parameter in first.items():
        parameter.grad = full_tensor(f"first {name}", tuple(parameter.shape))
    second["linear_qkv.A"].grad = full_tensor("second", tuple(second["linear_qkv.A"].shape))
    expected = {name: parameter.grad.clone() for name, parameter in first.items()}  # type: ignore[union-attr]
    expected["linear_qkv.A"] += second["linear_qkv.A"].grad
    adapter.reduce_gradients()
    for name, gradient in expected.items():
        assert torch.equal(first[name].grad, gradient), name
        assert torch.equal(second[name].grad, gradient), name
        assert first[name].grad is not second[name].grad


def test_a_tied_tensor_that_no_linear_of_the_chunk_uses_gets_zeros_and_changes_nothing() -> None:
    """Megatron's DDP with overlap_grad_reduce waits for every parameter's gradient."""
    adapter = two_chunks(layers=[0])
    without = adapter.chunks[1]
    output, mean = forward_step(batches(), without.outer)
    mean(output)[0].backward()
    gradients = {name: parameter.grad for name, parameter in without.factors.named_parameters()}
    assert gradients.keys() == {f"{target}.{factor}" for target in TARGETS for factor in "AB"}
    assert [name for name, gradient in gradients.items() if gradient is None or gradient.any()] == []
    adapter.remove()
    assert torch.equal(forward_step(batches(), without.outer)[0], output)


def test_per_layer_gradients_are_not_touched() -> None:
    adapter = two_chunks()
    own = [p for chunk in adapter.chunks for n, p in chunk.factors.named_factors() if n.layer is not None]
    for parameter in own[::2]:
        parameter.grad = torch.ones_like(parameter)
    adapter.reduce_gradients()
    assert all(torch.equal(p.grad, torch.ones_like(p)) for p in own[::2])
    assert all(p.grad is None for p in own[1::2])


def test_nothing_is_done_if_megatron_keeps_the_gradients() -> None:
    adapter = two_chunks()
    for chunk in adapter.chunks:
        for _, parameter in chunk.factors.named_parameters():
            parameter.main_grad = torch.ones_like(parameter)  # type: ignore[attr-defined]
    adapter.reduce_gradients()
    for parameter in adapter.parameters():
        assert parameter.grad is None
        assert torch.equal(parameter.main_grad, torch.ones_like(parameter))  # type: ignore[attr-defined]


def test_main_grad_is_summed_if_the_caller_asks_for_it() -> None:
    adapter = two_chunks()
    for parameter in adapter.parameters():
        parameter.main_grad = torch.ones_like(parameter)  # type: ignore[attr-defined]
    adapter.reduce_gradients("main_grad")
    for chunk in tied(adapter):
        assert {p.main_grad.unique().item() for p in chunk.values()} == {2.0}  # type: ignore[attr-defined]


def test_frozen_tied_factors_are_not_summed() -> None:
    adapter = inject([build_gpt(num_layers=1)], TiedLoraConfig.preset("vera", rank=3))
    reduce_over_pipeline([adapter.chunks[0].factors], "grad")
    assert {p.grad for p in tied(adapter)[0].values()} == {None}


@pytest.fixture(scope="module")
def oracle() -> dict[str, Gradients]:
    """The gradients of the whole model on one process: the mean over the microbatches."""
    single_process()
    results = {}
    for name, config in CONFIGS.items():
        model = build_gpt()
        adapter = inject(model, TiedLoraConfig.from_mapping(config))
        randomise(adapter)
        for tokens in batches():
            output, mean = forward_step(iter([tokens]), model)
            (mean(output)[0] / MICROBATCHES).backward()
        results[name] = {name: p.grad for name, p in adapter.named_parameters() if p.grad is not None}
    return results


def wrong(got: Gradients, expected: Gradients) -> list[str]:
    """The names whose gradient differs from the oracle's."""
    return [name for name, g in got.items() if not (g - expected[name]).norm() <= RELATIVE * expected[name].norm()]


@pytest.mark.parametrize("name", CONFIGS)
def test_a_sum_after_megatrons_own_changes_nothing(
    name: str, two_ranks: list[dict[str, Any]], oracle: dict[str, Gradients]
) -> None:
    """The caller gives DDP the config that built the model, so the flag must be on that object."""
    stages = [rank["ddp"][name, "reduced again"] for rank in two_ranks]
    assert stages[0].keys() | stages[1].keys() == oracle[name].keys()
    assert [wrong(gradients, oracle[name]) for gradients in stages] == [[], []]


@pytest.mark.parametrize("loop", ["flag off", "not finalized"])
def test_the_comparison_notices_a_missing_sum(
    loop: str, two_ranks: list[dict[str, Any]], oracle: dict[str, Gradients]
) -> None:
    for rank in two_ranks:
        names = wrong(rank["ddp"]["tl6", loop], oracle["tl6"])
        assert names == [name for name in rank["ddp"]["tl6", loop] if not name.startswith("layers.")]


def test_the_pipeline_sum_is_one_all_reduce_of_the_tied_elements(two_ranks: list[dict[str, Any]]) -> None:
    # A (3, in) and B (out, 3) of the four targets at hidden 24, ffn 40.
    elements = 3 * ((24 + 72) + (24 + 24) + (24 + 40) + (40 + 24))
    assert [rank["all-reduces"] for rank in two_ranks] == [{"calls": 1, "elements": elements}] * 2


def test_only_what_is_marked_is_summed_over_tensor_parallel_ranks(two_ranks: list[dict[str, Any]]) -> None:
    assert [rank["marked"] for rank in two_ranks] == [
        [[2.0, 10.0], [1.0, 0.0], [3.0, 4.0]],
        [[2.0, 10.0], [1.0, 10.0], [3.0, 4.0]],
    ]


@pytest.fixture(scope="module")
def whole_sequence() -> Record:
    single_process()
    return train(Run(**SEQUENCE_PARALLEL))


def test_sequence_parallel_gradients_without_the_sum_are_noticed(
    two_ranks: list[dict[str, Any]], whole_sequence: Record
) -> None:
    """The gradients of replicated factors are partial: A and u of columns; B, u and v of rows."""
    partial_over_ranks = {("linear_qkv", f) for f in "Au"} | {("linear_fc1", f) for f in "Au"}
    partial_over_ranks |= {(t, f) for t in ("linear_proj", "linear_fc2") for f in "Buv"}
    for rank in two_ranks:
        names = wrong(rank["sequence, no sum"].gradients[0], whole_sequence.gradients[0])
        assert {tuple(name.split(".")[-2:]) for name in names} == partial_over_ranks


@pytest.mark.parametrize(("kind", "replicated"), [("column", True), ("row", False), ("column, sequence", False)])
def test_dropout_masks_agree_exactly_where_x_is_replicated(
    kind: str, replicated: bool, two_ranks: list[dict[str, Any]]
) -> None:
    first, second = (rank["dropout"][kind] for rank in two_ranks)
    assert set(first) == set(second) == {0.0, 2.0}
    assert (first == second) is replicated
