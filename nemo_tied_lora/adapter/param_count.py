# SPDX-License-Identifier: Apache-2.0
"""How many parameters an adapter trains and stores: the paper's formula, from shapes alone."""

from __future__ import annotations

from collections.abc import Mapping

from nemo_tied_lora.adapter.experts import groups_of
from nemo_tied_lora.adapter.shapes import TargetShape
from nemo_tied_lora.config import FACTORS, TiedLoraConfig

__all__ = ["factor_numel", "parameter_counts", "stored_counts", "tied_copies"]


def factor_numel(factor: str, shape: TargetShape, config: TiedLoraConfig) -> int:
    """Elements of one factor over all layers: A is r*in, B is out*r, u r, v out.

    A tied one exists once, or once for each expert where experts are not tied to each other; any other once for each
    layer and expert.
    """
    one = {
        "A": config.rank * shape.in_features,
        "B": config.rank * shape.out_features,
        "u": config.rank,
        "v": shape.out_features,
    }[factor]
    return one * (tied_copies(shape, config) if factor in config.tied else shape.num_experts * shape.num_layers)


def tied_copies(shape: TargetShape, config: TiedLoraConfig) -> int:
    """How many of each tied factor there are over all layers."""
    return 1 if config.experts == "tied" else shape.num_experts


def parameter_counts(shapes: Mapping[str, TargetShape], config: TiedLoraConfig) -> dict[str, int]:
    """Trained parameters per target. ``sum(....values())`` is the adapter's total; only config.targets count."""
    return {
        target: sum(factor_numel(factor, shapes[target], config) for factor in config.trained)
        for target in _selected(shapes, config)
    }


def stored_counts(shapes: Mapping[str, TargetShape], config: TiedLoraConfig) -> dict[str, int]:
    """Elements in the adapter's file per target: the trained ones, and frozen A and B (a frozen u or v is 1)."""
    stored = [factor for factor in FACTORS if factor in config.trained or factor in ("A", "B")]
    return {
        target: sum(factor_numel(factor, shapes[target], config) for factor in stored)
        for target in _selected(shapes, config)
    }


def _selected(shapes: Mapping[str, TargetShape], config: TiedLoraConfig) -> list[str]:
    return [group for target in config.targets for group in groups_of(target) if group in shapes]
