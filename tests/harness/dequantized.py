# SPDX-License-Identifier: Apache-2.0
"""The reference of a quantised base: the same model with plain weights that hold the dequantised values."""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn

from nemo_tied_lora.adapter.quantized.quantized_weight import QuantizedWeight

__all__ = ["make_plain", "quantized_weights"]


def quantized_weights(model: nn.Module) -> Iterator[tuple[str, nn.Module, QuantizedWeight]]:
    """Yields (path of the weight, its module, the weight)."""
    for path, module in model.named_modules():
        weight = module._parameters.get("weight")
        if isinstance(weight, QuantizedWeight):
            yield f"{path}.weight", module, weight


def make_plain(model: nn.Module) -> None:
    """Replaces each quantised weight by a frozen plain one, with Megatron's attributes."""
    found = list(quantized_weights(model))
    assert found or not list(model.parameters())
    for _, module, weight in found:
        plain = nn.Parameter(weight.dequantize(), requires_grad=False)
        for name, value in vars(weight).items():
            if name not in ("codes", "transposed", "_is_param"):
                setattr(plain, name, value)
        module.weight = plain
