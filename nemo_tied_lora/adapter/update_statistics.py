# SPDX-License-Identifier: Apache-2.0
"""What an adapter has learned, in numbers: norms of its factors and the rank that its updates make use of, per layer.

The update of a layer is dW = (alpha / r) diag(v) B diag(u) A. Its effective rank is exp(entropy of s / sum(s)) over its
singular values s (Roy and Vetterli, 2007): r where all directions count alike, 1 where one does all. The singular
values come from two r x r Gram matrices; dW itself is never formed.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from nemo_tied_lora.adapter.full_state import factors_of_layer
from nemo_tied_lora.adapter.param_count import parameter_counts
from nemo_tied_lora.adapter.shapes import TargetShape, TargetSpec
from nemo_tied_lora.config import TiedLoraConfig

__all__ = ["LayerFacts", "inspect_layers", "trained_parameters", "update_singular_values"]


@dataclass(frozen=True)
class LayerFacts:
    """One linear of one layer. norms: of its A, B and, where they are stored, u and v (Frobenius; a tied factor's is the
    same in every layer). rms: root mean square of u and v, comparable between linears of different widths; a frozen one
    is 1. update_norm: Frobenius norm of dW."""

    layer: int
    target: str
    norms: dict[str, float]
    rms: dict[str, float]
    update_norm: float
    effective_rank: float


def inspect_layers(
    config: TiedLoraConfig, specs: Mapping[str, TargetSpec], state: Mapping[str, torch.Tensor]
) -> list[LayerFacts]:
    """The facts of every adapted linear, layer by layer."""
    facts = []
    for target, spec in specs.items():
        for layer in spec.layers:
            factors = {f: t.double() for f, t in factors_of_layer(config, state, layer, target).items()}
            values = update_singular_values(config, factors)
            vectors = {f: factors[f] for f in "uv" if f in factors}
            facts.append(
                LayerFacts(
                    layer=layer,
                    target=target,
                    norms={f: float(torch.linalg.vector_norm(t)) for f, t in factors.items()},
                    rms={f: float(t.square().mean().sqrt()) for f, t in vectors.items()},
                    update_norm=float(values.square().sum().sqrt()),
                    effective_rank=_effective_rank(values),
                )
            )
    return sorted(facts, key=lambda fact: fact.layer)


def update_singular_values(config: TiedLoraConfig, factors: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """The r largest singular values of dW, descending, from A (r, in), B (out, r), u (r,) and v (out,)."""
    A, B = factors["A"], factors["B"]
    if "u" in factors:
        A = A * factors["u"].unsqueeze(1)
    if "v" in factors:
        B = B * factors["v"].unsqueeze(1)
    values, vectors = torch.linalg.eigh(A @ A.t())
    root = vectors * values.clamp_min(0).sqrt()
    squares = torch.linalg.eigvalsh(root.t() @ (B.t() @ B) @ root).clamp_min(0)
    return abs(config.scale) * squares.sqrt().flip(0)


def trained_parameters(config: TiedLoraConfig, specs: Mapping[str, TargetSpec]) -> dict[str, int]:
    """Per target, by the paper's formula."""
    shapes: dict[str, Any] = {t: TargetShape(s.in_features, s.out_features, len(s.layers)) for t, s in specs.items()}
    return parameter_counts(shapes, config)


def _effective_rank(values: torch.Tensor) -> float:
    """0 where the update is 0."""
    total = values.sum()
    if total == 0:
        return 0.0
    shares = values[values > 0] / total
    return float(torch.exp(-(shares * shares.log()).sum()))
