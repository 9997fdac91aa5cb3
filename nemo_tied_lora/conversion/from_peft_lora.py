# SPDX-License-Identifier: Apache-2.0
"""Reads peft's LoRA folder as low-rank deltas of Megatron's linears."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from nemo_tied_lora.conversion.hf_families import BaseSizes, family_of_base
from nemo_tied_lora.conversion.lora_deltas import LoraDeltas, read_deltas
from nemo_tied_lora.errors import ConfigError, Problems

__all__ = ["read_peft_lora"]


def read_peft_lora(folder: Path, base: Mapping[str, Any]) -> LoraDeltas:
    """Reads a plain LoRA of peft; see `lora_to_tied.read_lora`."""
    config = _json(folder / "adapter_config.json")
    _check_plain(config, folder)
    family, sizes = family_of_base(base, "base"), BaseSizes.from_model_config(base, "base")
    deltas = read_deltas(
        folder,
        _peft_tensors(folder),
        family.targets,
        sizes,
        pattern=rf"^base_model\.model\.{re.escape(family.layers)}\.(\d+)\.(.+)\.lora_A(?:\.default)?\.weight$",
        marks=(".lora_A.", ".lora_B."),
        scale=partial(_scale, config),
    )
    return LoraDeltas(deltas, sizes, dict(base))


def _scale(config: Mapping[str, Any], name: str, rank: int) -> float:
    """alpha / r of one linear, by peft's `alpha_pattern` and `use_rslora`."""
    module = name.removeprefix("base_model.model.").split(".lora_A")[0]
    alpha = config["lora_alpha"]
    for pattern, value in (config.get("alpha_pattern") or {}).items():
        if re.match(rf"(.*\.)?({pattern})$", module):
            alpha = value
            break
    return alpha / (rank**0.5 if config.get("use_rslora") else rank)


def _check_plain(config: Mapping[str, Any], folder: Path) -> None:
    """Raises ConfigError for everything in adapter_config.json that is not plain LoRA."""
    where, problems = f"path={folder}: adapter_config.json", Problems()
    if config.get("peft_type") != "LORA":
        problems.append(f"{where}: peft_type={config.get('peft_type')!r}: only LORA can be fitted")
    if not isinstance(config.get("lora_alpha"), (int, float)):
        problems.append(f"{where}: lora_alpha={config.get('lora_alpha')!r}: must be a number")
    for key in ("use_dora", "modules_to_save", "trainable_token_indices", "layer_replication"):
        if config.get(key):
            problems.append(f"{where}: {key}={config[key]!r}: a tied adapter cannot represent it")
    if config.get("bias", "none") != "none":
        problems.append(f"{where}: bias={config['bias']!r}: a tied adapter trains no biases")
    problems.raise_if_any()


def _peft_tensors(folder: Path) -> dict[str, torch.Tensor]:
    try:
        if (folder / "adapter_model.safetensors").is_file():
            return load_file(folder / "adapter_model.safetensors")
        if (folder / "adapter_model.bin").is_file():
            return dict(torch.load(folder / "adapter_model.bin", map_location="cpu", weights_only=True))
    except Exception as error:  # whatever a damaged file raises
        raise ConfigError([f"path={folder}: its weights cannot be read: {type(error).__name__}: {error}"]) from error
    raise ConfigError([f"path={folder}: holds neither adapter_model.safetensors nor adapter_model.bin"])


def _json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError([f"{path}: cannot be read: {error}; this is not a peft adapter"]) from error
    if not isinstance(value, dict):
        raise ConfigError([f"{path}: holds no keys; this is not a peft adapter"])
    return value
