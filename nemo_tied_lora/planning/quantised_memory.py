# SPDX-License-Identifier: Apache-2.0
"""Bytes of a quantised base on one rank: codes and statistics, what stays as it is, the peak of one linear. No model is built.

For a linear of n = rows x columns weights on the rank:

=======  ============  =====================================================================
kind     codes         statistics
=======  ============  =====================================================================
nf4      n / 2         n / block, each in 2 or 4 bytes
double   n / 2         n / block bytes, 4 bytes for each 256 of these, and 4 for their mean
int8     n             4 bytes a row
=======  ============  =====================================================================

While a linear multiplies, in forward and again in backward, its weight exists once in the dtype of the product. Backward
keeps the codes alone, which are the base's own: nothing is added.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

from nemo_tied_lora.adapter.shapes import LinearShape
from nemo_tied_lora.config import TiedLoraConfig
from nemo_tied_lora.planning.adapter_cost import Precision
from nemo_tied_lora.planning.architecture import Architecture, selected_linears
from nemo_tied_lora.planning.parallel_layout import Layout, stage_layers
from nemo_tied_lora.planning.settings.base_quantization import BaseQuantization

__all__ = ["QuantisedLinears", "quantised_bytes", "quantised_linears"]

_DOUBLE_BLOCK = 256
_FLOAT32 = 4


@dataclass(frozen=True)
class QuantisedLinears:
    """The decoder's linears on one rank of a stage."""

    precision: str
    """As adapters record it: "nf4/64"."""
    bits_per_weight: float
    """Codes and statistics together."""
    weights: int
    """How many weights the linears have."""
    held_bytes: int
    """Codes and statistics."""
    unquantised_bytes: int
    """What the same weights would take."""
    peak_bytes: int
    """The largest linear, dequantised: held while it multiplies."""

    def as_dict(self) -> dict[str, Any]:
        """As JSON values."""
        return asdict(self)


def quantised_linears(
    arch: Architecture, layout: Layout, stage: int, precision: Precision, quantization: BaseQuantization
) -> QuantisedLinears:
    """Counts the linears of a stage on one rank."""
    layers = set(stage_layers(arch, layout)[stage])
    weights = held = largest = 0
    for shape in selected_linears(arch, TiedLoraConfig()).values():
        rows, columns = _local(shape, layout.tp_size)
        number = len(layers.intersection(shape.layers)) * shape.num_experts
        weights += number * rows * columns
        held += number * quantised_bytes(rows, columns, quantization)
        largest = max(largest, rows * columns if number else 0)
    return QuantisedLinears(
        precision=quantization.precision,
        bits_per_weight=8 * held / weights if weights else 0.0,
        weights=weights,
        held_bytes=held,
        unquantised_bytes=weights * precision.weights,
        peak_bytes=largest * precision.activations,
    )


def quantised_bytes(rows: int, columns: int, quantization: BaseQuantization) -> int:
    """Bytes of one weight (rows, columns): its codes and their statistics."""
    weights = rows * columns
    if quantization.kind == "int8":
        return weights + rows * _FLOAT32
    blocks = math.ceil(weights / quantization.block_size)
    if not quantization.double:
        return weights // 2 + blocks * (_FLOAT32 if quantization.statistics == "float32" else 2)
    return weights // 2 + blocks + math.ceil(blocks / _DOUBLE_BLOCK) * _FLOAT32 + _FLOAT32


def _local(shape: LinearShape, tp_size: int) -> tuple[int, int]:
    """(rows, columns) of one rank's part of the weight."""
    if shape.kind == "column":
        return shape.out_features // tp_size, shape.in_features
    return shape.out_features, shape.in_features // tp_size
