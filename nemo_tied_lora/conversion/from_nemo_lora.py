# SPDX-License-Identifier: Apache-2.0
"""Reads stock NeMo's LoRA `.nemo` as low-rank deltas of Megatron's linears."""

from __future__ import annotations

import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from nemo_tied_lora.conversion.hf_families import BaseSizes, Part
from nemo_tied_lora.conversion.lora_deltas import LoraDeltas, LoraLayout, read_deltas
from nemo_tied_lora.conversion.nemo_lora_config import ADAPTER_MODULES, STATE, read_members_of, read_nemo_lora_config
from nemo_tied_lora.errors import ConfigError

__all__ = ["read_nemo_lora"]

_LAYERS = ("model.decoder.layers", "model.module.decoder.layers")
"""The second with NeMo's O2."""


def read_nemo_lora(path: Path, base: Mapping[str, Any] | None) -> LoraDeltas:
    """Reads the single-rank form, with NeMo's default `variant: nemo`; see `lora_to_tied.read_lora`."""
    description, config = read_nemo_lora_config(path)
    layout = LoraLayout(
        where=f"path={path}",
        layers=_LAYERS,
        sides=("linear_in", "linear_out"),
        module=lambda name: name.partition("decoder.layers.")[2],
        rank=lambda module: config.rank,
        scale=lambda module: config.scale,
        is_target=config.is_target,
    )
    own = {key: value for key, value in description.items() if key != "peft"}
    sizes = BaseSizes.from_model_config(base or own, "base" if base else f"path={path}: model_config.yaml")
    parts = {target: (Part(module, "all"),) for target, module in ADAPTER_MODULES.items()}
    return LoraDeltas(read_deltas(_state(path), parts, sizes, layout), sizes, dict(base or own))


def _state(path: Path) -> dict[str, torch.Tensor]:
    """All tensors. Runs no code of the pickle."""
    try:
        state = torch.load(io.BytesIO(read_members_of(path)[STATE]), map_location="cpu", weights_only=True)
    except ConfigError:
        raise
    except Exception as error:  # whatever a damaged or other file raises
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        raise ConfigError([f"path={path}: {STATE} cannot be read as tensors alone: {reason}"]) from error
    if not isinstance(state, dict) or not all(isinstance(value, torch.Tensor) for value in state.values()):
        raise ConfigError([f"path={path}: {STATE} holds more than tensors by name; this is not stock NeMo's LoRA"])
    return state
