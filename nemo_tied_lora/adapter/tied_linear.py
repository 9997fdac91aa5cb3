# SPDX-License-Identifier: Apache-2.0
"""The maths: adds the update to the output of a Megatron linear.

    y = W x + (alpha / r) diag(v) B diag(u) A x        alpha_rule sqrt: alpha / sqrt(r)

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

An expert's linears exchange nothing. In forward the token dispatcher gathers x over the tensor-parallel ranks and sums
y over them; in backward it does the reverse. So y of a row and the gradient of x of a column are this rank's share of a
sum, for the base as for the update. An expert gets only its own tokens, in its own order, and perhaps none.

If the factors are wider than x (float32 on a bfloat16 base), the update is computed in their dtype, and rounded once, when
it is added to y. h crosses the network in their dtype.

The factors are scaled, not the activations. v and the scale are folded into B. u is folded into the replicated factor
(A of a column, B of a row) if that factor gets a gradient anyway; otherwise u multiplies the r-wide h.
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

from nemo_tied_lora.adapter.tied_factors import Factors
from nemo_tied_lora.config import TiedLoraConfig

__all__ = ["LinearAdapter", "TiedLoraMixin", "attach_to_linear", "detach_from_linear", "linear_kind"]


def linear_kind(module: nn.Module) -> str | None:
    """Returns "column" or "row" for a parallel linear of Megatron or Transformer Engine, None for other modules."""
    if isinstance(module, ColumnParallelLinear):
        return "column"
    if isinstance(module, RowParallelLinear):
        return "row"
    mode = getattr(module, "parallel_mode", None)  # of Transformer Engine's linears
    weight = getattr(module, "weight", None)
    return mode if mode in ("column", "row") and isinstance(weight, torch.Tensor) else None


@dataclass
class LinearAdapter:
    """The adapter of one linear: its factors and how they are applied.

    It is a plain object, not a module: the factors are registered in `ChunkFactors` alone.
    """

    config: TiedLoraConfig
    kind: str
    tied: Factors
    own: Factors
    tp_size: int
    sequence_parallel: bool
    expert: bool = False
    enabled: bool = True

    def factor(self, name: str) -> torch.Tensor | None:
        """Returns this rank's part of A, B, u or v; None for a u or v that is frozen at 1. A rank budget masks u."""
        if name == "u":
            return self.own.masked_u()
        holder = self.tied if name in self.config.tied else self.own
        return getattr(holder, name, None)

    def folded(self, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor]:
        """Returns (A, scale of h or None, B) with u, v and the scale folded in; local shapes as in `shapes`."""
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

    def compute_dtype(self, x: torch.Tensor) -> torch.dtype:
        """The dtype in which the update of x is computed: autocast's, else the wider one of x and the factors."""
        if torch.is_autocast_enabled(x.device.type):
            return torch.get_autocast_dtype(x.device.type)
        A = self.factor("A")
        assert A is not None
        return torch.promote_types(x.dtype, A.dtype)

    def dropped_out(self, x: torch.Tensor) -> torch.Tensor:
        """Applies dropout to x: with the same mask on all ranks if x is replicated, different masks if it is sharded."""
        if not self.config.dropout:
            return x
        if self.tp_size == 1 or (self.kind == "column" and (self.expert or not self.sequence_parallel)):
            return functional.dropout(x, self.config.dropout)
        with get_cuda_rng_tracker().fork():
            return functional.dropout(x, self.config.dropout)

    def across_ranks(self, h: torch.Tensor, h_scale: torch.Tensor | None) -> torch.Tensor:
        """Exchanges h between ranks as in the table above, and scales it by `h_scale`."""
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
    """Comes before a Megatron linear's own class. Takes and returns what that linear takes and returns.

    The linear's weights keep their names. `tied_lora` is a plain attribute, not a submodule.
    """

    tied_lora: LinearAdapter

    def forward(self, input_: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        adapter = self.tied_lora
        if not adapter.enabled:
            return super().forward(input_, *args, **kwargs)  # type: ignore[misc]
        if getattr(self, "layer_norm_weight", None) is not None:
            return self._forward_after_fused_norm(input_, *args, **kwargs)
        A, h_scale, B = adapter.folded(adapter.compute_dtype(input_))
        if self.training and adapter.config.dropout:  # type: ignore[attr-defined]
            shortcut, h = input_, functional.linear(adapter.dropped_out(input_).to(A.dtype), A)
        else:
            shortcut, h = _first_product(input_, A)
        output, bias = super().forward(shortcut, *args, **kwargs)  # type: ignore[misc]
        return _SecondProduct.apply(output, adapter.across_ranks(h, h_scale), B), bias

    def _forward_after_fused_norm(self, input_: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        """For Transformer Engine's fused layer norm and linear: the update acts on the norm's output."""
        adapter = self.tied_lora
        self.return_layernorm_output = True
        try:
            (output, normed), bias = _fused_norm_outputs(super().forward(input_, *args, **kwargs))  # type: ignore[misc]
        finally:
            self.return_layernorm_output = False  # if the update is disabled, callers expect two values
        A, h_scale, B = adapter.folded(adapter.compute_dtype(normed))
        x = adapter.dropped_out(normed) if self.training else normed  # type: ignore[attr-defined]
        h = functional.linear(x.to(A.dtype), A)
        return _SecondProduct.apply(output, adapter.across_ranks(h, h_scale), B), bias


def attach_to_linear(module: nn.Module, adapter: LinearAdapter) -> None:
    """Changes the module's class so that its forward adds the update. Copies no tensor."""
    cls = type(module)
    if cls not in _mixed:
        _mixed[cls] = type(f"TiedLora{cls.__name__}", (TiedLoraMixin, cls), {})
    module.__class__ = _mixed[cls]
    module.__dict__["tied_lora"] = adapter


def detach_from_linear(module: nn.Module) -> None:
    """Gives the module its own class again. Does nothing if it has it."""
    if isinstance(module, TiedLoraMixin):
        module.__class__ = type(module).__bases__[1]
    module.__dict__.pop("tied_lora", None)


_mixed: dict[type, type] = {}


def _all_reduce(h: torch.Tensor) -> torch.Tensor:
    return reduce_from_tensor_model_parallel_region(h)


def _fused_norm_outputs(outputs: Any) -> tuple[tuple[torch.Tensor, torch.Tensor], torch.Tensor | None]:
    """Returns ((y, normed x), bias) from either form that Transformer Engine returns."""
    if len(outputs) == 3:
        output, bias, normed = outputs
        return (output, normed), bias
    return outputs


def _first_product(x: torch.Tensor, A: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns (x for the base, h = x A^T). If x needs no gradient, the base's x needs none either."""
    if x.requires_grad and torch.is_grad_enabled():
        return _FirstProduct.apply(x, A)
    return x, functional.linear(x.to(A.dtype), A)


class _FirstProduct(torch.autograd.Function):
    """x (..., in) -> x for the base linear, h = x A^T (..., r).

    In backward the base computes the gradient of x first. The matrix product of the update adds to that tensor in place;
    this is safe because the base has just made it and nothing else refers to it. x is kept for backward only if A gets
    a gradient.
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
    """y (..., out), h (..., r), B (out, r) -> y + h B^T, computed in y's own memory.

    The base linear has just made y, and nothing else refers to it. If some backward had saved y, autograd's version
    counter would raise an error.
    """

    @staticmethod
    def forward(ctx: Any, y: torch.Tensor, h: torch.Tensor, B: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(h if ctx.needs_input_grad[2] else None, B)
        return _accumulate(y.detach(), h.reshape(-1, h.shape[-1]), B.t())

    @staticmethod
    def backward(ctx: Any, grad_y: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        h, B = ctx.saved_tensors
        flat = grad_y.reshape(-1, B.shape[0]).to(B.dtype)
        # Must be contiguous: Megatron's all-reduce silently ignores other tensors.
        grad_h = (flat @ B).view(*grad_y.shape[:-1], B.shape[1])
        grad_B = None if h is None else _grad_of_second_factor(flat, h.reshape(-1, B.shape[1]))
        return grad_y, grad_h, grad_B


def _grad_of_second_factor(grad_y: torch.Tensor, h: torch.Tensor) -> torch.Tensor:
    """grad_y (m, out), h (m, r) -> grad_y^T h (out, r).

    The narrow side goes first if r is small: on a CPU this takes a third of the time at r = 8 and 0.9 of it at r = 32.
    At r = 128 it saves nothing, and the transposed layout slows the sums over layers.
    """
    return (h.t() @ grad_y).t() if h.shape[1] < 64 else grad_y.t() @ h


def _accumulate(total: torch.Tensor, left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """total (..., n) += left (m, k) @ right (k, n), in total's memory if its layout and dtype allow that."""
    if total.dtype != left.dtype:
        return total + (left @ right).view(total.shape).to(total.dtype)
    return total.reshape(-1, total.shape[-1]).addmm_(left, right).view(total.shape)
