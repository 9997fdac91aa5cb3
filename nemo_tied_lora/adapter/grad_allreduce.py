# SPDX-License-Identifier: Apache-2.0
"""Sums gradients over ranks, and sets the flags that make Megatron sum them itself.

=====================================================  ==========================  ===============================
gradient                                               partial over                summed by
=====================================================  ==========================  ===============================
tied A, B                                              pipeline stages and chunks  `finalize_model_grads`, or here
A, u of columns; B, u, v of rows; sequence parallel    tensor-parallel ranks       Megatron, NeMo, or here
everything else                                        nothing                     --
=====================================================  ==========================  ===============================

Experts' linears follow the same rules. Tensor-parallel experts need sequence parallelism; then the dispatcher gives them
every rank's tokens, and the gradients of replicated factors are partial because each rank has a part of the weight. An
expert without tokens in a step has zero gradients and takes part in every sum.
The training loop sums over data-parallel ranks, as for any parameter.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from megatron.core import parallel_state
from torch import nn
from torch._utils import _flatten_dense_tensors, _unflatten_dense_tensors

from nemo_tied_lora.adapter.shapes import LinearShape
from nemo_tied_lora.adapter.tied_factors import ChunkFactors

__all__ = ["add_zero_gradients", "mark_parameters", "reduce_over_pipeline", "reduce_over_tensor_parallel"]


def mark_parameters(
    chunk: ChunkFactors, shapes: dict[str, LinearShape], *, first: bool, sequence_parallel: bool
) -> None:
    """Sets the attributes of parameters that megatron-core (0.13 to 0.19) and NeMo read.

    Args:
        chunk: one chunk's factors.
        shapes: group to whole shape.
        first: whether this is the first chunk of the first stage. Gradient norms count its copy of a tied tensor.
        sequence_parallel: whether activations outside the linears are split over the sequence.
    """
    for name, parameter in chunk.named_factors():
        _mark_tensor_parallel(parameter, name.factor, shapes[name.group], sequence_parallel)
        if name.layer is not None:
            continue
        parameter.zero_out_wgrad = True  # type: ignore[attr-defined]  # fused kernels: used by several layers
        if parameter.requires_grad:
            parameter.pipeline_parallel = True  # type: ignore[attr-defined]  # finalize_model_grads sums over PP
            parameter.shared_embedding = True  # type: ignore[attr-defined]  # DDP gives it a separate bucket
            parameter.shared = not first  # type: ignore[attr-defined]  # norms and zero counts: once


def reduce_over_pipeline(chunks: Sequence[ChunkFactors], grad_attr: str) -> None:
    """Sums the tied gradients over this stage's chunks, then over the pipeline group: one coalesced all-reduce.

    A stage or chunk without a gradient contributes zeros and receives the sum. Every stage must call this.
    """
    copies = [chunk.tied_parameters() for chunk in chunks]
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


def add_zero_gradients(output: torch.Tensor, parameters: Sequence[nn.Parameter]) -> torch.Tensor:
    """Returns `output` unchanged; backward also gives each of `parameters` a zero gradient."""
    return _ZeroGradients.apply(output, *parameters) if torch.is_grad_enabled() else output


class _ZeroGradients(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, output: torch.Tensor, *parameters: torch.Tensor) -> torch.Tensor:
        ctx.parameters = parameters
        same = output.new_empty(0)  # not a view: Megatron's pipeline frees the memory of outputs that it has sent
        same.data = output.data
        return same

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return gradient, *(torch.zeros_like(parameter) for parameter in ctx.parameters)


def _mark_tensor_parallel(parameter: nn.Parameter, factor: str, shape: LinearShape, sequence_parallel: bool) -> None:
    dim = shape.sharded_dim(factor)
    parameter.tensor_model_parallel = dim is not None  # type: ignore[attr-defined]
    parameter.partition_dim = -1 if dim is None else dim  # type: ignore[attr-defined]
    parameter.partition_stride = shape.blocks_of(factor)  # type: ignore[attr-defined]
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
