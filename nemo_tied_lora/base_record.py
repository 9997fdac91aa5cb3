# SPDX-License-Identifier: Apache-2.0
"""What an adapter's file says of its base, under NeMo's model keys."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

__all__ = ["recorded_model_keys"]

# (the activation's function in Megatron, gated or not) -> NeMo's word. "fast" is how NeMo's LoRA knows a gated linear.
_ACTIVATIONS = {("silu", True): "fast-swiglu", ("gelu", True): "fast-geglu", ("relu", True): "fast-reglu"}


def recorded_model_keys(description: Mapping[str, Any]) -> dict[str, Any]:
    """NeMo's model keys of the base, from an adapter's `model_config.yaml`; empty where it records none.

    The record may hold NeMo's own keys, or the architecture as Megatron's config names it.
    """
    record = description.get("base") or {}
    architecture = dict(record.get("architecture") or {})
    gated = architecture.pop("gated_linear_unit", None)
    if gated is not None:
        activation = str(architecture.get("activation"))
        architecture["activation"] = _ACTIVATIONS.get((activation, True), f"{activation}-glu") if gated else activation
        architecture["bias"] = architecture.pop("add_bias_linear", None)
        architecture["qkv_bias"] = architecture.pop("add_qkv_bias", None)
        architecture["rotary_percentage"] = architecture.pop("rotary_percent", None)
        architecture["normalization"] = str(architecture.get("normalization")).lower()
    own = {
        key: value for key, value in record.items() if key not in ("architecture", "fingerprint", "tokenizer", "name")
    }
    return {key: value for key, value in {**own, **architecture}.items() if value is not None}
