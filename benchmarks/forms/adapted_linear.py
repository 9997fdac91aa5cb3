# SPDX-License-Identifier: Apache-2.0
"""A frozen linear with a low-rank update, for few CPU cores."""

from __future__ import annotations

from typing import Any

import torch

__all__ = ["adapted_linear"]


def adapted_linear(x: torch.Tensor, weight: torch.Tensor, down: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """y = W x + up^T (down x), with gradients of x, down and up.

    Args:
        x: (T, in), in the base's dtype.
        weight: W (out, in), frozen.
        down: (r, in), float32 (float64 on a float64 base).
        up: (r, out), as down.

    Returns:
        (T, out) in the base's dtype. The update is computed in the factors' dtype, and rounded to the base's.
    """
    return _Adapted.apply(x, weight, down, up)


class _Adapted(torch.autograd.Function):
    """One node instead of eight: keeps x and h (r, T), and nothing of (T, out).

    Thin products have the rank as their first dim. With it last, they take up to eight times as long on a CPU.
    """

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, down: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
        h = down @ x.to(down.dtype).t()
        y = x @ weight.t()
        y += (h.t() @ up).to(y.dtype)  # one dtype: a sum of two makes copies that take longer than the product
        ctx.save_for_backward(x, weight, down, up, h)
        return y

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (grad,) = grads
        x, weight, down, up, h = ctx.saved_tensors
        wide = grad.to(up.dtype)
        inner = up @ wide.t()  # (r, T)
        grad_x = None
        if ctx.needs_input_grad[0]:
            grad_x = grad @ weight
            grad_x += (inner.t() @ down).to(grad_x.dtype)
        grad_down = inner @ x.to(down.dtype) if ctx.needs_input_grad[2] else None
        grad_up = h @ wide if ctx.needs_input_grad[3] else None
        return grad_x, None, grad_down, grad_up
