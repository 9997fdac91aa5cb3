# SPDX-License-Identifier: Apache-2.0
"""How many parameters an adapter trains and stores: the paper's formula, from shapes alone."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from nemo_tied_lora.config import FACTORS, TiedLoraConfig

__all__ = ["TargetShape", "factor_numel", "parameter_counts", "stored_counts"]


@dataclass(frozen=True)
class TargetShape:
    """One kind of linear of a model, whole (not one rank's shard).

    in_features, out_features: columns and rows of its weight. num_layers: how many selected layers have it.
    """

    in_features: int
    out_features: int
    num_layers: int


def factor_numel(factor: str, shape: TargetShape, config: TiedLoraConfig) -> int:
    """Elements of one factor over all layers: A is r*in, B is out*r (once where tied, else per layer), u r, v out."""
    per_layer = {
        "A": config.rank * shape.in_features,
        "B": config.rank * shape.out_features,
        "u": config.rank,
        "v": shape.out_features,
    }[factor]
    return per_layer if factor in config.tied else per_layer * shape.num_layers


def parameter_counts(shapes: Mapping[str, TargetShape], config: TiedLoraConfig) -> dict[str, int]:
    """Trained parameters per target. ``sum(....values())`` is the adapter's total; only config.targets count."""
    return {
        target: sum(factor_numel(factor, shapes[target], config) for factor in config.trained)
        for target in config.targets
        if target in shapes
    }


def stored_counts(shapes: Mapping[str, TargetShape], config: TiedLoraConfig) -> dict[str, int]:
    """Elements in the adapter's file per target: the trained ones, and frozen A and B (a frozen u or v is 1)."""
    stored = [factor for factor in FACTORS if factor in config.trained or factor in ("A", "B")]
    return {
        target: sum(factor_numel(factor, shapes[target], config) for factor in stored)
        for target in config.targets
        if target in shapes
    }
