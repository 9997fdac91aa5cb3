# SPDX-License-Identifier: Apache-2.0
"""Masks by the name of each u, and the atoms that they leave. Imports no Megatron.

An atom is row i of a tied A and column i of a tied B. It is dead if every linear that uses them has pruned entry i of its u.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

from nemo_tied_lora.adapter.experts import tied_name
from nemo_tied_lora.adapter.factor_names import FactorName, each_linear
from nemo_tied_lora.adapter.shapes import LinearShape
from nemo_tied_lora.config import TiedLoraConfig

__all__ = ["by_name", "live_atoms", "u_names"]


def u_names(shapes: Mapping[str, LinearShape]) -> tuple[str, ...]:
    """The names of all u of the model, in the order of the budget's vectors."""
    return tuple(str(FactorName(layer, linear, "u")) for layer, linear, _ in each_linear(shapes))


def by_name(mask: torch.Tensor, shapes: Mapping[str, LinearShape]) -> dict[str, torch.Tensor]:
    """The mask of all entries, (linears * rank,) bool, as the name of each u to its own, (rank,) on the CPU."""
    names = u_names(shapes)
    return dict(zip(names, mask.cpu().view(len(names), -1), strict=True))


def live_atoms(config: TiedLoraConfig, masks: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The name of the linears' tied tensors (as "linear_qkv") to the atoms that are not dead, (rank,) bool."""
    live: dict[str, torch.Tensor] = {}
    for name, mask in masks.items():
        shared = tied_name(FactorName.parse(name).linear, config.experts)
        live[shared] = live[shared] | mask if shared in live else mask
    return live
