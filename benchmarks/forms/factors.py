# SPDX-License-Identifier: Apache-2.0
"""The trained tensors of a form, and what they make of them in each layer."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch

from nemo_tied_lora.adapter.factor_names import FactorName
from nemo_tied_lora.adapter.tied_factors import initial_tensor
from nemo_tied_lora.config import TiedLoraConfig

from .adapted_linear import adapted_linear
from .form import Form, Linear

__all__ = ["Directions", "Factors"]

Directions = Callable[[str, int], tuple[torch.Tensor, torch.Tensor]]
"""(target, group) to orthonormal directions: rows (r, in) and columns (out, r). See `gradient_start`."""


class Factors:
    """The factors of one form on all layers.

    With G groups, L layers, and for each target: A (G, r, in), B (G, out, r), R (L, r) or (L, r, r), v (L, outputs, blocks
    or directions), V (out, directions). Random numbers of A and B are those that the package draws from the seed: of an
    untied form for each layer, of a tied one for all, of a group for its first layer.

    Args:
        directions: where A or B starts from the gradient.
    """

    def __init__(
        self,
        form: Form,
        linears: Mapping[str, Linear],
        layers: int,
        seed: int,
        dtype: torch.dtype = torch.float32,
        directions: Directions | None = None,
    ) -> None:
        self.form, self._linears, self._groups = form, linears, form.groups(layers)
        self._seed, self._dtype, self._directions = seed, dtype, directions
        self.tensors: dict[tuple[str, str], torch.Tensor] = {}
        """(target, factor) to tensor; factors are A, B, R (u, if it is diagonal), v and V."""
        self.masks: dict[str, torch.Tensor] = {}
        """Target to 1 where u (L, r) stays and 0 where it is pruned; without a mask all stay."""
        self._names_of_A = form.names_of_A(linears)
        for target in form.targets:
            self._add(target, layers)
        self._ready: dict[str, tuple[list[torch.Tensor], list[torch.Tensor]]] = {}

    @property
    def trained(self) -> dict[tuple[str, str], torch.Tensor]:
        """The tensors that are trained."""
        return {name: tensor for name, tensor in self.tensors.items() if tensor.requires_grad}

    def prepare(self) -> None:
        """Makes each layer's two matrices of the factors' present values. Call it before each forward."""
        self._ready = {target: self._matrices(target) for target in self.form.targets}

    def apply(self, layer: int, target: str, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        """W x + Delta W x; see `llama.Apply`."""
        if target not in self._ready:
            return torch.nn.functional.linear(x, weight)
        down, up = self._ready[target]
        return adapted_linear(x, weight, down[layer], up[layer])

    def delta(self, layer: int, target: str) -> torch.Tensor:
        """Delta W (out, in) of one linear."""
        down, up = self._matrices(target)
        return up[layer].t() @ down[layer]

    def _matrices(self, target: str) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        """For each layer R_l A_g (r, in), and s diag(v_l) B_g transposed (r, out)."""
        form = self.form
        A = self.tensors[self._names_of_A[target], "A"].unbind()
        B = (self.tensors[target, "B"].transpose(1, 2) * form.scale).contiguous().unbind()
        down, up = [A[group] for group in self._groups], [B[group] for group in self._groups]
        if form.core == "diagonal":
            us = self.tensors[target, "u"] * self.masks.get(target, 1.0)
            down = [u[:, None] * a for u, a in zip(us.unbind(), down, strict=True)]
        elif form.core == "full":
            down = [R @ a for R, a in zip(self.tensors[target, "R"].unbind(), down, strict=True)]
        if form.v != "none":
            up = [v * b for v, b in zip(self._outputs(target).unbind(), up, strict=True)]
        return down, up

    def _outputs(self, target: str) -> torch.Tensor:
        """v_l, spread over the outputs: (L, out)."""
        v, out = self.tensors[target, "v"], self._linears[target].out_features
        if self.form.v == "directions":
            return v @ self.tensors[target, "V"].t()
        return v if self.form.v == "free" else v.repeat_interleave(self.form.v_size, 1)[:, :out]

    def _add(self, target: str, layers: int) -> None:
        form, linear = self.form, self._linears[target]
        if self._names_of_A[target] == target:
            self._keep(target, "A", torch.stack(list(self._starts(target, "A"))), form.train_A)
        self._keep(target, "B", torch.stack(list(self._starts(target, "B"))), form.train_B)
        if form.core == "diagonal":
            self._keep(target, "u", torch.full((layers, form.rank), form.start_core))
        elif form.core == "full":
            self._keep(target, "R", form.start_core * torch.eye(form.rank).repeat(layers, 1, 1))
        if form.v == "directions":
            draw = torch.Generator().manual_seed(self._seed)
            V = torch.randint(0, 2, (linear.out_features, form.v_size), generator=draw) * 2.0 - 1.0
            self._keep(target, "V", V / form.v_size**0.5)
        if form.v != "none":
            self._keep(target, "v", torch.full((layers, form.blocks(linear.out_features)), form.start_v))

    def _keep(self, target: str, factor: str, values: torch.Tensor, trained: bool = True) -> None:
        self.tensors[target, factor] = values.to(self._dtype).requires_grad_(trained)

    def _starts(self, target: str, factor: str) -> Iterator[torch.Tensor]:
        """The start of A (r, in) or B (out, r) of each group."""
        form, linear = self.form, self._linears[target]
        start = form.start_A if factor == "A" else form.start_B
        shape = (form.rank, linear.in_features) if factor == "A" else (linear.out_features, form.rank)
        init: dict[str, Any] = {f"init_{factor}": "normal"} if start == "normal" else {}
        config = TiedLoraConfig(rank=form.rank, seed=self._seed, **init)
        for group in range(self._groups[-1] + 1):
            layer = None if form.group is None else self._groups.index(group)
            if start == "zero":
                yield torch.zeros(shape)
            elif start == "gradient":
                assert self._directions is not None, "this form needs directions"
                yield self._directions(target, group)[0 if factor == "A" else 1]
            else:
                drawn = initial_tensor(FactorName(layer, target, factor), shape, config)
                yield _orthogonal(drawn) if start == "orthogonal" else drawn


def _orthogonal(drawn: torch.Tensor) -> torch.Tensor:
    """The nearest matrix with orthogonal rows (or columns, if there are more rows), with the same norm."""
    left, _, right = torch.linalg.svd(drawn, full_matrices=False)
    nearest = left @ right
    return nearest * (drawn.norm() / nearest.norm())
