# SPDX-License-Identifier: Apache-2.0
"""The importance of each entry of u, and the choice of the entries that stay. Pure maths on whole vectors.

With u and its complete gradient g (n entries each), after each optimizer step (AdaLoRA, arXiv 2303.10512):

    s = |u g|          I = b I + (1 - b) s, at first s          U = b U + (1 - b) |s - I|          b = 0.85

The b(t) entries with the largest I U stay (see `schedule`). Of equal entries the first ones stay, so that exactly as many
stay as the budget says, and the same ones on every rank.

u alone is enough. The entry i of layer l multiplies row i of A and column i of B, so

    u_li dL/du_li  =  sum_j A_ij dL/dA_ij (layer l's share)  =  sum_k B_ki dL/dB_ki (layer l's share):

AdaLoRA's terms of A and B have the same sums. Where A and B are tied, they cannot be had for each layer at all.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

from nemo_tied_lora.adapter.rank_budget.schedule import BudgetSchedule
from nemo_tied_lora.errors import ConfigError

__all__ = ["Importance"]

SMOOTHING = 0.85
"""b, for I and for U: the paper's beta_1 and beta_2."""
_SLOTS = {"importance": torch.float64, "uncertainty": torch.float64, "mask": torch.bool}


class Importance:
    """I, U and the mask of n entries. Every rank holds the same ones. float64: I U of small gradients is very small.

    Args:
        entries: n.
        returns: whether an entry that was pruned may be chosen again.
    """

    def __init__(self, entries: int, *, returns: bool, device: torch.device):
        self.importance = torch.zeros(entries, dtype=torch.float64, device=device)
        self.uncertainty = torch.zeros_like(self.importance)
        self.mask = torch.ones(entries, dtype=torch.bool, device=device)
        self.done = 0
        """The number of optimizer steps that were observed."""
        self._returns = returns

    def observe(self, products: torch.Tensor, schedule: BudgetSchedule) -> bool:
        """Takes the products u g (n,) of an optimizer step, and chooses anew if it is time. Returns whether it has chosen.

        If a product is not finite, the step changes nothing but the count: its scores would stay NaN for ever.
        """
        if schedule.is_fixed(self.done):
            self.done += 1
            return False
        if self.mask.device != products.device:  # the model was moved
            for slot in _SLOTS:
                setattr(self, slot, getattr(self, slot).to(products.device))
        scores, first = products.abs().double(), self.done == 0
        self.done += 1
        usable = scores.isfinite().all()
        importance = scores if first else SMOOTHING * self.importance + (1 - SMOOTHING) * scores
        uncertainty = SMOOTHING * self.uncertainty + (1 - SMOOTHING) * (scores - importance).abs()
        self.importance = torch.where(usable, importance, self.importance)
        self.uncertainty = torch.where(usable, uncertainty, self.uncertainty)
        if not schedule.chooses(self.done):
            return False
        self.mask = self._largest(schedule.budget(self.done))
        return True

    def state(self) -> dict[str, torch.Tensor]:
        """I and U (n,) float64, and the mask (n,) bool, on the CPU."""
        return {slot: getattr(self, slot).cpu().clone() for slot in _SLOTS}

    def load(self, state: Mapping[str, torch.Tensor], done: int) -> None:
        """Loads what `state` returned.

        Raises:
            ConfigError: a tensor is missing, or has another shape or dtype.
        """
        problems = []
        for slot, dtype in _SLOTS.items():
            tensor, shape = state.get(slot), tuple(self.mask.shape)
            if tensor is None or tuple(tensor.shape) != shape or tensor.dtype != dtype:
                found = "missing" if tensor is None else f"{tensor.dtype} of shape {tuple(tensor.shape)}"
                problems.append(f"rank_budget: {slot} is {found}, the adapter needs {dtype} of shape {shape}")
        if problems:
            raise ConfigError(problems)
        for slot in _SLOTS:
            setattr(self, slot, state[slot].to(self.mask.device).clone())
        self.done = done

    def _largest(self, number: int) -> torch.Tensor:
        scores = self.importance * self.uncertainty
        if not self._returns:
            scores = scores.masked_fill(~self.mask, -1.0)
        order = torch.argsort(scores, descending=True, stable=True)
        mask = torch.zeros_like(self.mask)
        mask[order[:number]] = True
        return mask
