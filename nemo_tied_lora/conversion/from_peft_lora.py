# SPDX-License-Identifier: Apache-2.0
"""Reads peft's LoRA folder as low-rank deltas of Megatron's linears."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

from nemo_tied_lora.conversion.hf_families import BaseSizes, family_of_base
from nemo_tied_lora.conversion.lora_deltas import LoraDeltas, LoraLayout, read_deltas
from nemo_tied_lora.conversion.peft_lora_config import is_target, rank_of, read_peft_config, scale_of
from nemo_tied_lora.conversion.stored_tensors import StoredTensors

__all__ = ["read_peft_lora"]

_PREFIX = "base_model.model."


def read_peft_lora(folder: Path, base: Mapping[str, Any]) -> LoraDeltas:
    """Reads a plain LoRA of peft; see `lora_to_tied.read_lora`."""
    config = read_peft_config(folder)
    family = family_of_base(base, "base", "so peft's LoRA cannot belong to it; name the base that it was trained on")
    sizes = BaseSizes.from_model_config(base, "base")
    stored = StoredTensors(folder, "adapter_model", "adapter_model")
    layout = LoraLayout(
        where=f"path={folder}",
        layers=(f"{_PREFIX}{family.layers}",),
        sides=("lora_A", "lora_B"),
        module=lambda name: name.removeprefix(_PREFIX),
        rank=partial(rank_of, config),
        scale=partial(scale_of, config),
        is_target=None if config.get("target_modules") is None else partial(is_target, config),
    )
    state = {name: stored.read(name) for name in stored.files}
    deltas = read_deltas(state, family.targets, sizes, layout)
    return LoraDeltas(deltas, sizes, dict(base), _other_base(config, base))


def _other_base(config: Mapping[str, Any], base: Mapping[str, Any]) -> tuple[str, ...]:
    """A note if the LoRA names another base. Names are all that can be compared: a LoRA does not know its base's weights."""
    theirs, ours = config.get("base_model_name_or_path"), (base.get("huggingface") or {}).get("name")
    if not theirs or not ours or Path(str(theirs)).name == ours:
        return ()
    return (f"the LoRA names its base {theirs}, but base= was made of {ours}; both must have the same weights",)
