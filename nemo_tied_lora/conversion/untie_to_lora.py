# SPDX-License-Identifier: Apache-2.0
"""A tied adapter layer by layer: per layer it is plain LoRA, exactly.

(alpha / r) diag(v) B diag(u) A x  =  (plain_alpha / r) lora_B lora_A x
lora_A = diag(u) A  (r, in)           lora_B = diag(v) B  (out, r)
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

__all__ = ["PlainLora", "expand", "layers_of", "plain_alpha"]


@dataclass(frozen=True)
class PlainLora:
    """One layer's LoRA of one target, whole, in Megatron's row order: lora_A (r, in), lora_B (out, r)."""

    layer: int
    target: str
    lora_A: torch.Tensor
    lora_B: torch.Tensor


def plain_alpha(config: TiedLoraConfig) -> int:
    """The alpha of the plain LoRA: the adapter's own where it is whole, else the rank, and `expand` folds the rest.

    Readers of plain LoRA take alpha for a whole number.
    """
    alpha = config.rank if config.alpha is None else config.alpha
    return int(alpha) if float(alpha).is_integer() else config.rank


def layers_of(shapes: Mapping[str, LinearShape]) -> tuple[int, ...]:
    """The layers that have the adapter.

    Raises:
        ConfigError: they are not the same for every target, which plain LoRA's files cannot say.
    """
    layers = {shape.layers for shape in shapes.values()}
    if len(layers) > 1:
        raise ConfigError([f"targets: {t} is adapted in layers {list(s.layers)}" for t, s in shapes.items()])
    return layers.pop()


def expand(
    config: TiedLoraConfig, shapes: Mapping[str, LinearShape], state: Mapping[str, torch.Tensor]
) -> Iterator[PlainLora]:
    """Every layer's LoRA, float32 at least, layer by layer; only one at a time is in memory."""
    folded = config.scale * config.rank / plain_alpha(config)
    for layer, linear, _ in each_linear(shapes):
        factors = factors_of_layer(config, state, layer, linear)
        dtype = torch.promote_types(factors["A"].dtype, torch.float32)
        A, B = factors["A"].to(dtype), factors["B"].to(dtype)
        if "u" in factors:
            A = A * factors["u"].to(dtype).unsqueeze(1)
        if "v" in factors:
            B = B * factors["v"].to(dtype).unsqueeze(1)
        yield PlainLora(layer, linear, A.contiguous(), (B if folded == 1.0 else B * folded).contiguous())
