# SPDX-License-Identifier: Apache-2.0
"""A LoRA adapter, peft's folder or stock NeMo's `.nemo`, as low-rank deltas of Megatron's linears, and the tied adapter
that is closest to it."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from nemo_tied_lora.config import TARGETS
from nemo_tied_lora.conversion.hf_families import BaseSizes, Family, family_of_base
from nemo_tied_lora.conversion.lora_deltas import LoraDeltas, LowRank
from nemo_tied_lora.errors import ConfigError

__all__ = ["read_peft_lora"]


def read_peft_lora(folder: Path, base: Mapping[str, Any]) -> LoraDeltas:
    config = _json(folder / "adapter_config.json")
    _check_plain(config, folder)
    family, sizes = family_of_base(base, "base"), BaseSizes.from_model_config(base, "base")
    state = _peft_tensors(folder)
    found: dict[tuple[int, str, int], LowRank] = {}
    problems = []
    pattern = re.compile(
        rf"^base_model\.model\.{re.escape(family.layers)}\.(\d+)\.(.+)\.lora_A(?:\.default)?\.weight$"
    )
    places = {part.name: (t, i) for t, parts in family.targets.items() for i, part in enumerate(parts)}
    for name in [n for n in state if ".lora_A." in n]:
        match = pattern.match(name)
        if match is None or match[2] not in places or int(match[1]) >= sizes.num_layers:
            problems.append(f"path={folder}: {name} is no linear of the base's layers 0 to {sizes.num_layers - 1}")
            continue
        A, B = state.pop(name), state.pop(name.replace(".lora_A", ".lora_B"), None)
        target, index = places[match[2]]
        rows = len(sizes.rows(target, family.targets[target][index].share))
        if B is None or A.shape[1] != sizes.linears[target].in_features or B.shape != (rows, len(A)):
            got = f"{tuple(A.shape)}, {None if B is None else tuple(B.shape)}"
            needed = f"(r, {sizes.linears[target].in_features}), ({rows}, r)"
            problems.append(f"path={folder}: {name} and its lora_B are {got}; the base needs {needed}")
            continue
        found[int(match[1]), target, index] = LowRank(B.double() * _scale(config, name, len(A)), A.double())
    problems += [f"path={folder}: {name} is no LoRA of a linear" for name in state if ".lora_A." not in name]
    if not found and not problems:
        problems.append(f"path={folder}: holds no LoRA tensors")
    if problems:
        raise ConfigError(problems)
    return LoraDeltas(_fused(found, family, sizes), sizes, dict(base))


def _fused(
    found: Mapping[tuple[int, str, int], LowRank], family: Family, sizes: BaseSizes
) -> dict[str, dict[int, LowRank]]:
    """The parts of a fused linear as one delta: their A's one below the other, their B's in their own rows and columns."""
    deltas: dict[str, dict[int, LowRank]] = {}
    for target in TARGETS:
        for layer in sorted({layer for layer, t, _ in found if t == target}):
            parts = {
                i: found[layer, target, i] for i in range(len(family.targets[target])) if (layer, target, i) in found
            }
            width = sum(len(part.Q) for part in parts.values())
            P, start = torch.zeros(sizes.linears[target].out_features, width, dtype=torch.float64), 0
            for index, part in parts.items():
                P[sizes.rows(target, family.targets[target][index].share), start : start + len(part.Q)] = part.P
                start += len(part.Q)
            deltas.setdefault(target, {})[layer] = LowRank(P, torch.cat([part.Q for part in parts.values()]))
    return deltas


def _scale(config: Mapping[str, Any], name: str, rank: int) -> float:
    """alpha / r of one linear, with peft's patterns."""
    module = name.removeprefix("base_model.model.").split(".lora_A")[0]
    alpha = config["lora_alpha"]
    for pattern, value in (config.get("alpha_pattern") or {}).items():
        if re.match(rf"(.*\.)?({pattern})$", module):
            alpha = value
            break
    return alpha / (rank**0.5 if config.get("use_rslora") else rank)


def _check_plain(config: Mapping[str, Any], folder: Path) -> None:
    where, problems = f"path={folder}: adapter_config.json", []
    if config.get("peft_type") != "LORA":
        problems.append(f"{where}: peft_type={config.get('peft_type')!r}: only LORA can be fitted")
    if not isinstance(config.get("lora_alpha"), (int, float)):
        problems.append(f"{where}: lora_alpha={config.get('lora_alpha')!r}: must be a number")
    for key in ("use_dora", "modules_to_save", "trainable_token_indices", "layer_replication"):
        if config.get(key):
            problems.append(f"{where}: {key}={config[key]!r}: a tied adapter has no such thing")
    if config.get("bias", "none") != "none":
        problems.append(f"{where}: bias={config['bias']!r}: a tied adapter trains no biases")
    if problems:
        raise ConfigError(problems)


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
        raise ConfigError([f"{path}: cannot be read: {error}; this is no peft adapter"]) from error
    if not isinstance(value, dict):
        raise ConfigError([f"{path}: holds no keys; this is no peft adapter"])
    return value
