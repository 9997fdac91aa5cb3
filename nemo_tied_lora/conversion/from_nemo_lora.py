# SPDX-License-Identifier: Apache-2.0
"""Reads stock NeMo's LoRA `.nemo` as low-rank deltas of Megatron's linears."""

from __future__ import annotations

import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import yaml

from nemo_tied_lora.conversion.hf_families import BaseSizes, Part
from nemo_tied_lora.conversion.lora_deltas import LoraDeltas, read_deltas
from nemo_tied_lora.conversion.to_nemo_lora import ADAPTER_MODULES, read_nemo_lora_members
from nemo_tied_lora.errors import ConfigError

__all__ = ["read_nemo_lora"]


def read_nemo_lora(path: Path, base: Mapping[str, Any] | None) -> LoraDeltas:
    """Reads the single-rank form, with NeMo's default `variant: nemo`; see `lora_to_tied.read_lora`."""
    config, weights = read_nemo_lora_members(path)
    try:
        description = yaml.safe_load(config)
        state = torch.load(io.BytesIO(weights), map_location="cpu", weights_only=True)
        section = description["peft"]["lora_tuning"]
        alpha = section.get("alpha", section["adapter_dim"])
    except Exception as error:  # whatever a damaged or other file raises
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        raise ConfigError([f"path={path}: is not a stock NeMo LoRA of the single-rank form: {reason}"]) from error
    if section.get("variant") == "canonical":
        raise ConfigError([f"path={path}: lora_tuning.variant=canonical: only variant nemo can be read"])
    sizes = BaseSizes.from_model_config(base or description, "base" if base else f"path={path}: model_config.yaml")
    deltas = read_deltas(
        path,
        state,
        {target: (Part(module, "all"),) for target, module in ADAPTER_MODULES.items()},
        sizes,
        pattern=r"^model\.(?:module\.)?decoder\.layers\.(\d+)\.(.+)\.linear_in\.weight$",
        marks=(".linear_in.", ".linear_out."),
        scale=lambda name, rank: alpha / rank,
    )
    own = {key: value for key, value in description.items() if key != "peft"}
    return LoraDeltas(deltas, sizes, dict(base or own))
