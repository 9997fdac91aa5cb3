# SPDX-License-Identifier: Apache-2.0
"""Checks an export: compares the updates of the written file with the tied formula."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from nemo_tied_lora.adapter.full_state import factors_of_layer
from nemo_tied_lora.checkpoint.read_nemo_adapter import AdapterFile

__all__ = ["Difference", "largest_difference"]


@dataclass(frozen=True)
class Difference:
    """The largest difference that was found."""

    relative: float
    """Relative to the largest output of its linear."""
    where: str
    """The linear or tensor."""

    def __str__(self) -> str:
        return f"{self.relative:.1e} relative, at {self.where}"


def largest_difference(file: AdapterFile, update: Callable[[int, str, torch.Tensor], torch.Tensor]) -> Difference:
    """Compares `update(layer, target, x)` with the literal formula, in float64, for one random x per target."""
    generator = torch.Generator().manual_seed(1234)
    worst = Difference(0.0, "every linear")
    for target, shape in file.shapes.items():
        x = torch.randn(shape.in_features, dtype=torch.float64, generator=generator)
        for layer in shape.layers:
            factors = {f: t.double() for f, t in factors_of_layer(file.config, file.state, layer, target).items()}
            h = factors["A"] @ x
            h = factors["B"] @ (h * factors["u"] if "u" in factors else h)
            expected = file.config.scale * (h * factors["v"] if "v" in factors else h)
            error = (update(layer, target, x) - expected).abs().max() / expected.abs().max().clamp_min(1e-300)
            if not error <= worst.relative:  # also true for NaN
                worst = Difference(float(error), f"layer {layer} {target}")
    return worst
