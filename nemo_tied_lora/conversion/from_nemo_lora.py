# SPDX-License-Identifier: Apache-2.0
"""Stock NeMo's LoRA `.nemo`, as low-rank deltas of Megatron's linears."""

from __future__ import annotations

import io
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import yaml

from nemo_tied_lora.config import TARGETS
from nemo_tied_lora.conversion.hf_families import BaseSizes
from nemo_tied_lora.conversion.lora_deltas import LoraDeltas, LowRank
from nemo_tied_lora.conversion.to_nemo_lora import ADAPTER_MODULES, read_nemo_lora_members
from nemo_tied_lora.errors import ConfigError

__all__ = ["read_nemo_lora"]


def read_nemo_lora(path: Path, base: Mapping[str, Any] | None) -> LoraDeltas:
    config, weights = read_nemo_lora_members(path)
    try:
        description = yaml.safe_load(config)
        state = torch.load(io.BytesIO(weights), map_location="cpu", weights_only=True)
        section = description["peft"]["lora_tuning"]
        alpha = section.get("alpha", section["adapter_dim"])
    except Exception as error:  # whatever a damaged or other file raises
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        raise ConfigError([f"path={path}: is no stock NeMo LoRA of the single-rank form: {reason}"]) from error
    sizes = BaseSizes.from_model_config(base or description, "base" if base else f"path={path}: model_config.yaml")
    targets = {module: target for target, module in ADAPTER_MODULES.items()}
    pattern = re.compile(r"^model\.(?:module\.)?decoder\.layers\.(\d+)\.(.+)\.linear_in\.weight$")
    deltas: dict[str, dict[int, LowRank]] = {}
    problems = []
    for name in [n for n in state if n.endswith(".linear_in.weight")]:
        match = pattern.match(name)
        A, B = state.pop(name), state.pop(name.replace(".linear_in.", ".linear_out."), None)
        target = targets.get(match[2]) if match else None
        if match is None or target is None or B is None:
            problems.append(
                f"path={path}: {name} is no LoRA of one of the four linears (variant: canonical is not read)"
            )
        elif A.shape[1] != sizes.linears[target].in_features or B.shape != (
            sizes.linears[target].out_features,
            len(A),
        ):
            needed = f"(r, {sizes.linears[target].in_features}), ({sizes.linears[target].out_features}, r)"
            problems.append(
                f"path={path}: {name} and its linear_out are {tuple(A.shape)}, {tuple(B.shape)}; the base needs {needed}"
            )
        else:
            deltas.setdefault(target, {})[int(match[1])] = LowRank(B.double() * (alpha / len(A)), A.double())
    problems += [f"path={path}: {name} is no LoRA of a linear" for name in state]
    if not deltas and not problems:
        problems.append(f"path={path}: holds no LoRA tensors")
    if problems:
        raise ConfigError(problems)
    own = {key: value for key, value in description.items() if key != "peft"}
    return LoraDeltas({t: deltas[t] for t in TARGETS if t in deltas}, sizes, dict(base or own))
