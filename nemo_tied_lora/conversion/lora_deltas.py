# SPDX-License-Identifier: Apache-2.0
"""A LoRA adapter as low-rank deltas of Megatron's linears."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from nemo_tied_lora.conversion.hf_families import BaseSizes

__all__ = ["LoraDeltas", "LowRank"]


@dataclass(frozen=True)
class LowRank:
    """A layer's delta P Q: P (out, k), Q (k, in)."""

    P: torch.Tensor
    Q: torch.Tensor


@dataclass
class LoraDeltas:
    """Every delta of an adapter, in Megatron's row order: target -> layer -> P Q. `base`: NeMo's keys of its base."""

    deltas: dict[str, dict[int, LowRank]]
    sizes: BaseSizes
    base: dict[str, Any]
