# SPDX-License-Identifier: Apache-2.0
"""Unties an adapter: in each layer it equals a plain LoRA, exactly.

scale diag(v) B diag(u) A x  =  (plain_alpha / r) lora_B lora_A x     scale = alpha / r, or alpha / sqrt(r) by alpha_rule
lora_A = diag(u) A  (r, in)     lora_B = (scale r / plain_alpha) diag(v) B  (out, r)
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch

from nemo_tied_lora.adapter.factor_names import each_linear
from nemo_tied_lora.adapter.full_state import factors_of_layer
from nemo_tied_lora.adapter.shapes import LinearShape
from nemo_tied_lora.config import TiedLoraConfig
from nemo_tied_lora.errors import ConfigError

__all__ = ["PlainLora", "expand", "layers_of", "plain_alpha", "plain_lora"]


@dataclass(frozen=True)
class PlainLora:
    """The LoRA of one linear in one layer, whole, with rows in Megatron's order."""

    layer: int
    target: str
    lora_A: torch.Tensor
    """(r, in)."""
    lora_B: torch.Tensor
    """(out, r)."""


def plain_alpha(config: TiedLoraConfig) -> int:
    """The alpha of the plain LoRA, a whole number because readers expect one: `alpha_by_rank`, else the rank."""
    alpha = config.alpha_by_rank
    return int(alpha) if float(alpha).is_integer() else config.rank


def layers_of(shapes: Mapping[str, LinearShape]) -> tuple[int, ...]:
    """The adapted layers, which all targets must share: NeMo's LoRA has one selection of layers for all of them.

    Raises:
        ConfigError: the layers differ between targets.
    """
    layers = {shape.layers for shape in shapes.values()}
    if len(layers) > 1:
        raise ConfigError(
            [
                f"targets: {target} is adapted in layers {list(shape.layers)}, other targets in others, and NeMo's LoRA has one "
                "layer_selection for all; use to=hf-peft or to=safetensors"
                for target, shape in shapes.items()
            ]
        )
    return layers.pop()


def plain_lora(
    config: TiedLoraConfig, state: Mapping[str, torch.Tensor], layer: int, linear: str, *, alpha: int | None = None
) -> PlainLora:
    """One linear's LoRA, in float32 or the factors' wider dtype.

    Args:
        alpha: of the plain LoRA; None: `plain_alpha`.
    """
    factors = factors_of_layer(config, state, layer, linear)
    dtype = torch.promote_types(factors["A"].dtype, torch.float32)
    A, B = factors["A"].to(dtype), factors["B"].to(dtype)
    if "u" in factors:
        A = A * factors["u"].to(dtype).unsqueeze(1)
    if "v" in factors:
        B = B * factors["v"].to(dtype).unsqueeze(1)
    folded = config.alpha_by_rank / (plain_alpha(config) if alpha is None else alpha)
    return PlainLora(layer, linear, A.contiguous(), (B if folded == 1.0 else B * folded).contiguous())


def expand(
    config: TiedLoraConfig,
    shapes: Mapping[str, LinearShape],
    state: Mapping[str, torch.Tensor],
    *,
    alpha: int | None = None,
) -> Iterator[PlainLora]:
    """Yields the LoRA of every linear, layer by layer, one at a time; see `plain_lora`."""
    for layer, linear, _ in each_linear(shapes):
        yield plain_lora(config, state, layer, linear, alpha=alpha)
