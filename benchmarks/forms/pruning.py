# SPDX-License-Identifier: Apache-2.0
"""AdaLoRA: during training, entries of u are pruned by their importance. The choice is the package's own."""

from __future__ import annotations

import torch

from nemo_tied_lora.adapter.rank_budget.importance import Importance
from nemo_tied_lora.adapter.rank_budget.schedule import BudgetSchedule
from nemo_tied_lora.adapter.shapes import LinearShape
from nemo_tied_lora.config import RankBudget

from .factors import Factors
from .form import Linear

__all__ = ["Pruning"]


class Pruning:
    """Follows the training of an untied form with `keep`.

    Args:
        linears: target to its sizes.
        steps: of the run; pruning begins after a sixth and ends after two thirds of them, as the package's default.
    """

    def __init__(self, factors: Factors, linears: dict[str, Linear], layers: int, steps: int) -> None:
        form = factors.form
        assert form.keep is not None
        self._factors, self._linears, self._layers = factors, linears, layers
        shapes = [
            LinearShape("column", linears[t].in_features, linears[t].out_features, 1, tuple(range(layers)))
            for t in form.targets
        ]
        self._schedule = BudgetSchedule.of_run(RankBudget(target_rank=form.keep), form.rank, shapes, steps)
        self._importance = Importance(self._schedule.entries, returns=False, device=torch.device("cpu"))

    def observe(self) -> None:
        """Call it in each step, after the backward pass and before the optimizer."""
        products = []
        for target in self._factors.form.targets:
            u = self._factors.tensors[target, "u"]
            assert u.grad is not None
            products.append((u.detach() * u.grad).flatten())
        if self._importance.observe(torch.cat(products), self._schedule):
            masks = self._importance.mask.view(-1, self._layers, self._factors.form.rank)
            for target, mask in zip(self._factors.form.targets, masks, strict=True):
                self._factors.masks[target] = mask.to(self._factors.tensors[target, "u"].dtype)

    def kept(self) -> int:
        """The parameters that are left: a row of A and a column of B for each entry of u, into which u is folded."""
        return sum(
            int(mask.sum()) * (self._linears[target].in_features + self._linears[target].out_features)
            for target, mask in self._factors.masks.items()
        )
