# SPDX-License-Identifier: Apache-2.0
"""What an adapter has learned: per linear, the norms of its factors and of its update, and the update's effective rank.

The update of a linear is dW = (alpha / r) diag(v) B diag(u) A. Its effective rank is exp(entropy of s / sum(s)) over its
singular values s (Roy and Vetterli, 2007): r if all directions have the same weight, 1 if one has it all. The singular
values come from two r x r Gram matrices; dW itself is never formed.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from nemo_tied_lora.adapter.factor_names import each_linear
from nemo_tied_lora.adapter.full_state import factors_of_layer
from nemo_tied_lora.adapter.shapes import LinearShape
from nemo_tied_lora.config import TiedLoraConfig

__all__ = ["LayerFacts", "inspect_layers"]


@dataclass(frozen=True)
class LayerFacts:
    """One linear of one layer."""

    layer: int
    target: str
    """The linear's name (see `experts`)."""
    norms: dict[str, float]
    """Frobenius norms of the stored factors; a tied factor's norm is the same in every layer."""
    rms: dict[str, float]
    """Root mean squares of the stored u and v: comparable between linears of different widths."""
    update_norm: float
    """Frobenius norm of dW."""
    effective_rank: float


def inspect_layers(
    config: TiedLoraConfig, shapes: Mapping[str, LinearShape], state: Mapping[str, torch.Tensor]
) -> list[LayerFacts]:
    """Returns the facts of every adapted linear, layer by layer."""
    facts = []
    for layer, linear, _ in each_linear(shapes):
        factors = {f: t.double() for f, t in factors_of_layer(config, state, layer, linear).items()}
        values = _update_singular_values(config, factors)
        vectors = {f: factors[f] for f in "uv" if f in factors}
        facts.append(
            LayerFacts(
                layer=layer,
                target=linear,
                norms={f: float(torch.linalg.vector_norm(t)) for f, t in factors.items()},
                rms={f: float(t.square().mean().sqrt()) for f, t in vectors.items()},
                update_norm=float(values.square().sum().sqrt()),
                effective_rank=_effective_rank(values),
            )
        )
    return facts


def _update_singular_values(config: TiedLoraConfig, factors: Mapping[str, torch.Tensor]) -> torch.Tensor:
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


def _effective_rank(values: torch.Tensor) -> float:
    """exp(entropy of the singular values); 0 if the update is 0."""
    total = values.sum()
    if total == 0:
        return 0.0
    shares = values[values > 0] / total
    return float(torch.exp(-(shares * shares.log()).sum()))
