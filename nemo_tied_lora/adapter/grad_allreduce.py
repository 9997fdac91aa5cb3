# SPDX-License-Identifier: Apache-2.0
"""Which gradient is summed over which group, and the flags by which Megatron does it itself.

=====================================================  ==========================  ===============================
gradient                                               partial over                summed by
=====================================================  ==========================  ===============================
tied A, B                                              pipeline stages and chunks  `finalize_model_grads`, or here
A, u of columns; B, u, v of rows; sequence parallel    tensor-parallel ranks       Megatron, NeMo, or here
everything else                                        nothing                     --
=====================================================  ==========================  ===============================

Experts' linears follow the same rules: under sequence parallelism, which tensor-parallel experts need, the dispatcher
gives them every rank's tokens, and what is replicated is partial over the tensor-parallel ranks too, since each has a
part of the weight. An expert that gets no token in a step has gradients of 0 and takes part in every sum.
Data-parallel sums are the training loop's own, as for any parameter.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from megatron.core import parallel_state
from torch import nn
from torch._utils import _flatten_dense_tensors, _unflatten_dense_tensors

from nemo_tied_lora.adapter.experts import group_of
from nemo_tied_lora.adapter.shapes import TargetSpec, sharded_dim
from nemo_tied_lora.adapter.tied_factors import ChunkFactors

__all__ = ["mark_parameters", "reduce_over_pipeline", "reduce_over_tensor_parallel", "take_part"]


def mark_parameters(
    chunk: ChunkFactors, specs: dict[str, TargetSpec], *, first: bool, sequence_parallel: bool
) -> None:
    """Sets on each parameter what megatron-core (0.13 to 0.16) and NeMo read from it.

    Args:
        chunk: one chunk's factors.
        specs: the targets.
        first: whether this is the first stage's first chunk, the one whose copy counts in norms.
        sequence_parallel: whether activations outside the linears are split over the sequence.
    """
    for name, factor, parameter in chunk.named_tied():
        _mark_tensor_parallel(parameter, factor, specs[group_of(name)], sequence_parallel)
        parameter.zero_out_wgrad = True  # type: ignore[attr-defined]  # fused kernels: used by several layers
        if parameter.requires_grad:
            parameter.pipeline_parallel = True  # type: ignore[attr-defined]  # finalize_model_grads sums over PP
            parameter.shared_embedding = True  # type: ignore[attr-defined]  # DDP: a bucket of its own
            parameter.shared = not first  # type: ignore[attr-defined]  # norms and zero counts: once
    for _, name, factor, parameter in chunk.named_own():
        _mark_tensor_parallel(parameter, factor, specs[group_of(name)], sequence_parallel)


def reduce_over_pipeline(chunks: Sequence[ChunkFactors], grad_attr: str) -> None:
    """Sums the tied gradients over this stage's chunks, then over the pipeline group: one coalesced all-reduce.

    A stage or chunk without a gradient contributes zeros, and gets the sum. Every stage must call this.
    """
    copies = [[p for _, _, p in chunk.named_tied() if p.requires_grad] for chunk in chunks]
    if not copies[0]:
        return
    gradients = [[_gradient(parameter, grad_attr) for parameter in chunk] for chunk in copies]
    total = gradients[0]
    for other in gradients[1:]:
        torch._foreach_add_(total, other)
    if parallel_state.get_pipeline_model_parallel_world_size() > 1:
        _all_reduce_coalesced(total, parallel_state.get_pipeline_model_parallel_group())
    for other in gradients[1:]:
        torch._foreach_copy_(other, total)


def reduce_over_tensor_parallel(parameters: Iterable[nn.Parameter], grad_attr: str) -> None:
    """Sums the gradients that sequence parallelism leaves partial: one coalesced all-reduce."""
    if parallel_state.get_tensor_model_parallel_world_size() == 1:
        return
    gradients = [_gradient(p, grad_attr) for p in parameters if getattr(p, "sequence_parallel", False)]
    if gradients:
        _all_reduce_coalesced(gradients, parallel_state.get_tensor_model_parallel_group())


def take_part(output: torch.Tensor, parameters: Sequence[nn.Parameter]) -> torch.Tensor:
    """The same output; its backward gives each of the parameters, which it does not depend on, a gradient of zeros."""
    return _TakePart.apply(output, *parameters) if torch.is_grad_enabled() else output


class _TakePart(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, output: torch.Tensor, *parameters: torch.Tensor) -> torch.Tensor:
        ctx.parameters = parameters
        same = output.new_empty(0)  # no view: Megatron's pipeline frees the memory of what it has sent on
        same.data = output.data
        return same

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return gradient, *(torch.zeros_like(parameter) for parameter in ctx.parameters)


def _mark_tensor_parallel(parameter: nn.Parameter, factor: str, spec: TargetSpec, sequence_parallel: bool) -> None:
    dim = sharded_dim(factor, spec.kind)
    parameter.tensor_model_parallel = dim is not None  # type: ignore[attr-defined]
    parameter.partition_dim = -1 if dim is None else dim  # type: ignore[attr-defined]
    parameter.partition_stride = spec.blocks if factor in ("B", "v") else 1  # type: ignore[attr-defined]
    parameter.sequence_parallel = sequence_parallel and dim is None  # type: ignore[attr-defined]


def _gradient(parameter: nn.Parameter, grad_attr: str) -> torch.Tensor:
    gradient = getattr(parameter, grad_attr, None)
    if gradient is None:
        gradient = torch.zeros_like(parameter)
        setattr(parameter, grad_attr, gradient)
    return gradient


def _all_reduce_coalesced(tensors: list[torch.Tensor], group: torch.distributed.ProcessGroup) -> None:
    flat = _flatten_dense_tensors(tensors)
    torch.distributed.all_reduce(flat, group=group)
    torch._foreach_copy_(tensors, list(_unflatten_dense_tensors(flat, tensors)))
