# SPDX-License-Identifier: Apache-2.0
"""A LoRA adapter as low-rank deltas of Megatron's linears, and its tensors read into them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from nemo_tied_lora.config import TARGETS
from nemo_tied_lora.conversion.hf_families import BaseSizes, Part
from nemo_tied_lora.conversion.lora_names import LoraLayout, checked_pairs

__all__ = ["LoraDeltas", "LoraLayout", "LowRank", "read_deltas"]


@dataclass(frozen=True)
class LowRank:
    """One layer's delta P Q with P (out, k) and Q (k, in)."""

    P: torch.Tensor
    Q: torch.Tensor

    @property
    def is_zero(self) -> bool:
        """Whether a factor is all 0, as B is in a LoRA that was not trained."""
        return not bool(self.P.any() and self.Q.any())


@dataclass
class LoraDeltas:
    """All deltas of an adapter, with rows in Megatron's order."""

    deltas: dict[str, dict[int, LowRank]]
    """Target to layer to delta."""
    sizes: BaseSizes
    base: dict[str, Any]
    """NeMo's model keys of the base."""
    notes: tuple[str, ...] = ()
    """What the user should know about the LoRA."""

    @property
    def layers(self) -> tuple[int, ...]:
        """The layers with a delta of any target."""
        return tuple(sorted({layer for by_layer in self.deltas.values() for layer in by_layer}))


def read_deltas(
    state: Mapping[str, torch.Tensor],
    parts: Mapping[str, tuple[Part, ...]],
    sizes: BaseSizes,
    layout: LoraLayout,
) -> dict[str, dict[int, LowRank]]:
    """Target to layer to delta, float64.

    A target may consist of several linears, each with a LoRA: the delta has their A's one below the other, and each B in
    its own rows and columns.

    Args:
        state: all tensors of the file, by name.
        parts: target to the linears that hold its rows.

    Raises:
        ConfigError: lists what is not a LoRA of the base's linears, has another shape, or does not fit its own
            configuration.
    """
    found: dict[tuple[str, int], dict[int, LowRank]] = {}
    for pair in checked_pairs(state, parts, sizes, layout):
        linears = found.setdefault((pair.target, pair.layer), {})
        linears[pair.part] = LowRank(pair.B.double() * layout.scale(pair.module), pair.A.double())
    deltas: dict[str, dict[int, LowRank]] = {}
    for target, layer in sorted(found, key=lambda key: (TARGETS.index(key[0]), key[1])):
        rows_of = [sizes.rows(target, part.share) for part in parts[target]]
        delta = _joined(found[target, layer], rows_of, sizes.linears[target].out_features)
        deltas.setdefault(target, {})[layer] = delta
    return deltas


def _joined(linears: Mapping[int, LowRank], rows_of: list[torch.Tensor], out_features: int) -> LowRank:
    """One delta of the LoRAs of a target's linears. rows_of: each linear's rows in the target."""
    P, start = torch.zeros(out_features, sum(len(part.Q) for part in linears.values()), dtype=torch.float64), 0
    for index, part in linears.items():
        P[rows_of[index], start : start + len(part.Q)] = part.P
        start += len(part.Q)
    return LowRank(P, torch.cat([part.Q for part in linears.values()]))
