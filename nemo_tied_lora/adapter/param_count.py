# SPDX-License-Identifier: Apache-2.0
"""How many parameters an adapter trains: the paper's formula, from shapes alone. Imports no torch."""

from __future__ import annotations

import math
from collections.abc import Mapping

from nemo_tied_lora.adapter.experts import groups_of
from nemo_tied_lora.adapter.shapes import LinearShape
from nemo_tied_lora.config import TiedLoraConfig

__all__ = ["factor_numel", "parameter_counts", "tied_copies"]


def factor_numel(factor: str, shape: LinearShape, config: TiedLoraConfig) -> int:
    """Elements of one factor over all layers: A is r*in, B is out*r, u r, v out.

    A tied factor exists once, or once per expert if experts are not tied to each other. Any other factor exists once
    per layer and expert.
    """
    copies = tied_copies(shape, config) if factor in config.tied else shape.num_linears
    return copies * math.prod(shape.factor_shape(factor, config.rank))


def tied_copies(shape: LinearShape, config: TiedLoraConfig) -> int:
    """How many of each tied factor there are over all layers."""
    return 1 if config.experts == "tied" else shape.num_experts


def parameter_counts(shapes: Mapping[str, LinearShape], config: TiedLoraConfig) -> dict[str, int]:
    """Trained parameters per group of `config.targets`. ``sum(....values())`` is the adapter's total."""
    return {
        group: sum(factor_numel(factor, shapes[group], config) for factor in config.trained)
        for target in config.targets
        for group in groups_of(target)
        if group in shapes
    }
