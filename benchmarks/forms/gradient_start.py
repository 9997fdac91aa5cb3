# SPDX-License-Identifier: Apache-2.0
"""A and B from the data: the leading directions of the gradient with respect to W, pooled over layers that share them.

One backward pass over a few training batches. The gradient G_l (out, in) of a layer is never made: with random Omega_l
(in, k) and Psi_l (k, out), only the sums over a group's layers of G_l Omega_l (out, k) and Psi_l G_l (k, in) are kept.
Their leading singular vectors approximate those of the layers' gradients side by side (a randomised range finder, Halko,
Martinsson and Tropp, arXiv 0909.4061). The idea of such a start: LoRA-GA (2407.05000), LoRA-SB (2411.19557).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch.nn import functional

from .form import Form
from .llama import Batch, FrozenLlama, at_least_float32

__all__ = ["GradientDirections"]

_OVERSAMPLED = 8
"""The sketch is wider than the rank by this much."""


class GradientDirections:
    """The leading directions of each target and group.

    Args:
        batches: training batches; the loss is the mean over their answers' tokens, each batch with equal weight.
        seed: of the random matrices.
    """

    def __init__(self, model: FrozenLlama, form: Form, batches: Sequence[Batch], seed: int) -> None:
        self._linears, self._groups = model.sizes.linears, form.groups(model.sizes.layers)
        self._rank, self._width = form.rank, form.rank + _OVERSAMPLED
        self._draw = torch.Generator().manual_seed(seed)
        self._random = {
            (layer, target): self._random_of(target) for layer in range(model.sizes.layers) for target in form.targets
        }
        self._rows: dict[tuple[str, int], torch.Tensor] = {}
        self._columns: dict[tuple[str, int], torch.Tensor] = {}
        self._anchor = torch.zeros((), requires_grad=True)
        for batch in batches:
            logits = model.answer_logits(batch, self._apply)
            functional.cross_entropy(at_least_float32(logits), batch.targets).backward()

    def __call__(self, target: str, group: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Orthonormal rows (r, in) and columns (out, r)."""
        rows = torch.linalg.svd(self._rows[target, group], full_matrices=False)[2][: self._rank]
        columns = torch.linalg.svd(self._columns[target, group], full_matrices=False)[0][:, : self._rank]
        return rows, columns

    def _random_of(self, target: str) -> tuple[torch.Tensor, torch.Tensor]:
        linear = self._linears[target]
        return (
            torch.randn(linear.in_features, self._width, generator=self._draw),
            torch.randn(self._width, linear.out_features, generator=self._draw),
        )

    def _apply(self, layer: int, target: str, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        if (layer, target) not in self._random:
            return functional.linear(x, weight)

        def keep(x: torch.Tensor, grad: torch.Tensor) -> None:
            omega, psi = self._random[layer, target]
            place = target, self._groups[layer]
            wide, grad = x.to(omega.dtype), grad.to(omega.dtype)
            for sums, part in (
                (self._rows, (psi @ grad.t()) @ wide),
                (self._columns, grad.t() @ (wide @ omega)),
            ):
                sums[place] = sums[place] + part if place in sums else part

        return _Watched.apply(x, weight, self._anchor, keep)


class _Watched(torch.autograd.Function):
    """y = W x; backward shows x and the gradient of y to `keep`. The anchor requires a gradient, so that backward runs."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, anchor: torch.Tensor, keep: Any) -> torch.Tensor:
        ctx.save_for_backward(x, weight)
        ctx.keep = keep
        return x @ weight.t()

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        ctx.keep(x, grads[0])
        return (grads[0] @ weight if ctx.needs_input_grad[0] else None), None, torch.zeros(()), None
