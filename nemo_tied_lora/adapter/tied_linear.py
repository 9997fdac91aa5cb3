# SPDX-License-Identifier: Apache-2.0
"""The maths: one Megatron linear becomes linear + update.

    y = W x + (alpha / r) diag(v) B diag(u) A x

h = A x is r wide, and only r-wide tensors cross the network (T = tensor parallel size, S = sequence, N = batch):

=================  ==========================  ===============================  ========================
kind               x on this rank              h, forward                       h, backward
=================  ==========================  ===============================  ========================
column             (S, N, in), replicated      --                               all-reduce
column, sequence   (S/T, N, in)                all-gather to (S, N, r)          reduce-scatter
row                (S, N, in/T)                all-reduce                       --
row, sequence      (S, N, in/T)                reduce-scatter to (S/T, N, r)    all-gather
column, expert     (tokens, in), replicated    --                               --
row, expert        (tokens, in/T)              --                               --
=================  ==========================  ===============================  ========================

An expert's linears exchange nothing: the token dispatcher gathers x over the tensor-parallel ranks and sums y over
them, and in backward the other way round. Like the base's own products, a row's y and a column's gradient of x are
that rank's share of the sum, the update's as well. The dispatcher's tokens are none of S x N: some, in the expert's
order, or none at all.

The factors are scaled, not the activations: v and alpha / r are folded into B; u is folded into the factor that is
replicated, A of a column and B of a row, where that one gets a gradient anyway, and else multiplies the r-wide h.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.tensor_parallel import (
    ColumnParallelLinear,
    RowParallelLinear,
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
    get_cuda_rng_tracker,
    reduce_from_tensor_model_parallel_region,
    reduce_scatter_to_sequence_parallel_region,
)
from torch import nn
from torch.nn import functional

from nemo_tied_lora.config import TiedLoraConfig

__all__ = ["LinearAdapter", "TiedLoraMixin", "attach_to_linear", "detach_from_linear", "linear_kind"]


def linear_kind(module: nn.Module) -> str | None:
    """ "column" or "row" for a Megatron or Transformer Engine parallel linear, None for anything else."""
    if isinstance(module, ColumnParallelLinear):
        return "column"
    if isinstance(module, RowParallelLinear):
        return "row"
    mode = getattr(module, "parallel_mode", None)  # Transformer Engine's linears say it themselves
    weight = getattr(module, "weight", None)
    return mode if mode in ("column", "row") and isinstance(weight, torch.Tensor) else None


@dataclass
class LinearAdapter:
    """What one linear needs to reach its factors. It refers to modules, not to parameters, and registers none."""

    config: TiedLoraConfig
    kind: str
    tied: nn.Module
    own: nn.Module
    tp_size: int
    sequence_parallel: bool
    expert: bool = False
    enabled: bool = True

    def factor(self, name: str) -> torch.Tensor | None:
        """This rank's part of A, B, u or v; None for a u or v that is frozen at 1."""
        holder = self.tied if name in self.config.tied else self.own
        return getattr(holder, name, None)

    def folded(self, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor]:
        """(A, what multiplies h or None, B) with u, v and alpha / r folded in, local shapes as in `sharding`."""
        A, B, u, v = (self.factor(name) for name in "ABuv")
        assert A is not None
        assert B is not None
        h_scale = u
        if u is not None and self.kind == "column" and A.requires_grad:
            A, h_scale = A * u.unsqueeze(1), None
        elif u is not None and self.kind == "row" and (B.requires_grad or v is not None):
            B, h_scale = B * u, None
        if v is not None:
            B = B * (v * self.config.scale).unsqueeze(1)
        elif self.config.scale != 1.0:
            B = B * self.config.scale
        return A.to(dtype), None if h_scale is None else h_scale.to(dtype), B.to(dtype)

    def to_first_product(self, x: torch.Tensor) -> torch.Tensor:
        """Dropout on x: the same mask on all ranks where x is replicated, different ones where it is sharded."""
        if not self.config.dropout:
            return x
        if self.tp_size == 1 or (self.kind == "column" and (self.expert or not self.sequence_parallel)):
            return functional.dropout(x, self.config.dropout)
        with get_cuda_rng_tracker().fork():
            return functional.dropout(x, self.config.dropout)

    def across_ranks(self, h: torch.Tensor, h_scale: torch.Tensor | None) -> torch.Tensor:
        """The r-wide exchange of the table above, and the factor u where it acts on h."""
        if self.expert:
            return h if h_scale is None else h * h_scale
        if self.kind == "column":
            h = h if h_scale is None else h * h_scale
            if self.tp_size == 1:
                return h
            if self.sequence_parallel:
                return gather_from_sequence_parallel_region(h)
            return copy_to_tensor_model_parallel_region(h)
        if self.tp_size > 1:
            exchange = reduce_scatter_to_sequence_parallel_region if self.sequence_parallel else _all_reduce
            h = exchange(h)
        return h if h_scale is None else h * h_scale


class TiedLoraMixin:
    """In front of a Megatron linear's own class. Takes and returns what that linear does.

    The linear's weights keep their names; the factors hang on `tied_lora`, an attribute that is no submodule.
    """

    tied_lora: LinearAdapter

    def forward(self, input_: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        link = self.tied_lora
        if not link.enabled:
            return super().forward(input_, *args, **kwargs)  # type: ignore[misc]
        if getattr(self, "layer_norm_weight", None) is not None:
            return self._forward_after_fused_norm(input_, *args, **kwargs)
        A, h_scale, B = link.folded(_compute_dtype(input_))
        if self.training and link.config.dropout:  # type: ignore[attr-defined]
            shortcut, h = input_, functional.linear(link.to_first_product(input_).to(A.dtype), A)
        else:
            shortcut, h = _first_product(input_, A)
        output, bias = super().forward(shortcut, *args, **kwargs)  # type: ignore[misc]
        return _SecondProduct.apply(output, link.across_ranks(h, h_scale), B), bias

    def _forward_after_fused_norm(self, input_: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        """Transformer Engine's layer norm + linear in one kernel: the update acts on the norm's output."""
        link = self.tied_lora
        self.return_layernorm_output = True
        try:
            (output, normed), bias = _fused_norm_outputs(super().forward(input_, *args, **kwargs))  # type: ignore[misc]
        finally:
            self.return_layernorm_output = (
                False  # a caller that meets the linear without its update expects two values
            )
        A, h_scale, B = link.folded(_compute_dtype(normed))
        x = link.to_first_product(normed) if self.training else normed  # type: ignore[attr-defined]
        h = functional.linear(x.to(A.dtype), A)
        return _SecondProduct.apply(output, link.across_ranks(h, h_scale), B), bias


def attach_to_linear(module: nn.Module, link: LinearAdapter) -> None:
    """Makes the linear add its update, in place."""
    cls = type(module)
    if cls not in _mixed:
        _mixed[cls] = type(f"TiedLora{cls.__name__}", (TiedLoraMixin, cls), {})
    module.__class__ = _mixed[cls]
    module.__dict__["tied_lora"] = link


def detach_from_linear(module: nn.Module) -> None:
    """The linear's own class again."""
    module.__class__ = type(module).__bases__[1]
    del module.__dict__["tied_lora"]


_mixed: dict[type, type] = {}


def _all_reduce(h: torch.Tensor) -> torch.Tensor:
    return reduce_from_tensor_model_parallel_region(h)


def _compute_dtype(x: torch.Tensor) -> torch.dtype:
    return torch.get_autocast_dtype(x.device.type) if torch.is_autocast_enabled(x.device.type) else x.dtype


def _fused_norm_outputs(outputs: Any) -> tuple[tuple[torch.Tensor, torch.Tensor], torch.Tensor | None]:
    """((y, normed x), bias) from either form that Transformer Engine returns."""
    if len(outputs) == 3:
        output, bias, normed = outputs
        return (output, normed), bias
    return outputs


def _first_product(x: torch.Tensor, A: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(x for the base, h = x A^T). Where x needs no gradient, neither does the base's copy of it."""
    if x.requires_grad and torch.is_grad_enabled():
        return _FirstProduct.apply(x, A)
    return x, functional.linear(x.to(A.dtype), A)


class _FirstProduct(torch.autograd.Function):
    """x (..., in) -> x for the base linear, h = x A^T (..., r).

    In backward the gradient of x arrives from the base first; the update's share is accumulated into it by the
    matrix product itself. That tensor is the base's own fresh product, which nothing else refers to. x is kept for
    backward only where A gets a gradient.
    """

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, A: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        ctx.save_for_backward(A, x if ctx.needs_input_grad[1] else None)
        ctx.set_materialize_grads(False)
        return x.detach(), functional.linear(x.to(A.dtype), A)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor | None) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        A, x = ctx.saved_tensors
        grad_x, grad_h = grads
        if grad_h is None:
            return grad_x, None
        lead = grad_h.shape[:-1]
        grad_h = grad_h.reshape(-1, A.shape[0])
        grad_A = None if x is None else grad_h.t() @ x.reshape(-1, A.shape[1]).to(grad_h.dtype)
        if grad_x is None:
            return (grad_h @ A).view(*lead, A.shape[1]), grad_A
        return _accumulate(grad_x, grad_h, A), grad_A


class _SecondProduct(torch.autograd.Function):
    """y (..., out), h (..., r), B (out, r) -> y + h B^T, accumulated into y's own memory.

    y is the base linear's fresh output, which nothing else refers to; were it saved for somebody's backward,
    autograd's version counter would raise an error.
    """

    @staticmethod
    def forward(ctx: Any, y: torch.Tensor, h: torch.Tensor, B: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(h if ctx.needs_input_grad[2] else None, B)
        return _accumulate(y.detach(), h.reshape(-1, h.shape[-1]), B.t())

    @staticmethod
    def backward(ctx: Any, grad_y: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        h, B = ctx.saved_tensors
        flat = grad_y.reshape(-1, B.shape[0]).to(B.dtype)
        # Contiguous: Megatron's all-reduce silently does nothing to a tensor that is not.
        grad_h = (flat @ B).view(*grad_y.shape[:-1], B.shape[1])
        grad_B = None if h is None else _grad_of_second_factor(flat, h.reshape(-1, B.shape[1]))
        return grad_y, grad_h, grad_B


def _grad_of_second_factor(grad_y: torch.Tensor, h: torch.Tensor) -> torch.Tensor:
    """grad_y (m, out), h (m, r) -> grad_y^T h (out, r).

    With the narrow side first a CPU takes a third of the time at r = 8, and 0.9 of it at r = 32; at r = 128 the same,
    and then the sums over layers are the slower for the transposed layout.
    """
    return (h.t() @ grad_y).t() if h.shape[1] < 64 else grad_y.t() @ h


def _accumulate(total: torch.Tensor, left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """total (..., n) += left (m, k) @ right (k, n), in total's memory where its layout and dtype allow."""
    if total.dtype != left.dtype:
        return total + (left @ right).view(total.shape).to(total.dtype)
    return total.reshape(-1, total.shape[-1]).addmm_(left, right).view(total.shape)
