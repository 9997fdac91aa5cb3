# SPDX-License-Identifier: Apache-2.0
"""Writes an adapter as stock NeMo's LoRA `.nemo`, in the single-rank form that NeMo's loader and deployment tools read.

The file's alpha is its adapter_dim, so its scale is 1, and `linear_out` holds the adapter's scale: TensorRT-LLM's
reader of this format never looks at alpha. It reads the LoRA of linear_qkv alone, and raises KeyError at any other.

model_config.yaml     the base's keys, and model.peft with peft_scheme: lora
model_weights.ckpt    model.decoder.layers.<i>.<block>.adapter_layer.<adapter>.linear_in.weight (r, in)
                                                                              .linear_out.weight (out, r)
"""

from __future__ import annotations

import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import yaml

from nemo_tied_lora.checkpoint.read_nemo_adapter import AdapterFile
from nemo_tied_lora.checkpoint.tar import write_tar
from nemo_tied_lora.conversion.hf_families import BaseSizes
from nemo_tied_lora.conversion.nemo_lora_config import ADAPTER_MODULES, CONFIG, STATE, TARGET_MODULES, read_members_of
from nemo_tied_lora.conversion.untie_to_lora import expand, layers_of
from nemo_tied_lora.conversion.verify_export import Difference, largest_difference
from nemo_tied_lora.errors import Problems
from nemo_tied_lora.files import replace_file

__all__ = ["REFUSED_BY_TENSORRT_LLM", "check_nemo_lora", "write_nemo_lora"]

REFUSED_BY_TENSORRT_LLM = ("linear_proj", "linear_fc1", "linear_fc2")
"""The targets at whose LoRA TensorRT-LLM's reader of NeMo's format raises KeyError."""


def write_nemo_lora(file: AdapterFile, base: Mapping[str, Any], path: Path) -> Path:
    """Writes the `.nemo` beside `path` and renames it there.

    Args:
        file: the tied adapter.
        base: NeMo's model keys of the base that it was trained on. The file holds them, because its readers need them.

    Raises:
        ConfigError: the base's shapes are missing, or are not those of the adapter.
    """
    _check_base(file, base)
    state = {}
    for lora in expand(file.config, file.shapes, file.state, alpha=file.config.rank):
        name = _module_name(lora.layer, lora.target)
        state[f"{name}.linear_in.weight"] = lora.lora_A.clone()
        state[f"{name}.linear_out.weight"] = lora.lora_B.clone()
    content = io.BytesIO()
    torch.save(state, content)
    description = {**base, "peft": _peft_section(file)}
    members = {CONFIG: yaml.safe_dump(description, sort_keys=False).encode(), STATE: content.getvalue()}
    return replace_file(path, lambda handle: write_tar(handle, members))


def check_nemo_lora(path: Path, file: AdapterFile) -> Difference:
    """Reads the `.nemo` back and compares its updates, as NeMo's layers compute them, with the tied formula."""
    members = read_members_of(path)
    state = torch.load(io.BytesIO(members[STATE]), map_location="cpu", weights_only=True)
    section = yaml.safe_load(members[CONFIG])["peft"]["lora_tuning"]
    scale = section["alpha"] / section["adapter_dim"]

    def update(layer: int, target: str, x: torch.Tensor) -> torch.Tensor:
        name = _module_name(layer, target)
        A, B = (state[f"{name}.linear_{side}.weight"].to(x.dtype) for side in ("in", "out"))
        return scale * (B @ (A @ x))

    return largest_difference(file, update)


def _module_name(layer: int, target: str) -> str:
    return f"model.decoder.layers.{layer}.{ADAPTER_MODULES[target]}"


def _peft_section(file: AdapterFile) -> dict[str, Any]:
    """`model.peft` of a LoRA run of NeMo. `layer_selection` counts layers from 1."""
    return {
        "peft_scheme": "lora",
        "restore_from_path": None,
        "lora_tuning": {
            "variant": "nemo",
            "target_modules": [TARGET_MODULES[target] for target in file.shapes],
            "adapter_dim": file.config.rank,
            "alpha": file.config.rank,
            "adapter_dropout": 0.0,
            "column_init_method": "xavier",
            "row_init_method": "zero",
            "layer_selection": [layer + 1 for layer in layers_of(file.shapes)],
            "weight_tying": False,
            "position_embedding_strategy": None,
        },
    }


def _check_base(file: AdapterFile, base: Mapping[str, Any]) -> None:
    sizes = BaseSizes.from_model_config(base, "base")
    problems = Problems(sizes.differences(file.shapes))
    if sizes.gated and not str(base["activation"]).startswith("fast-") and "linear_fc1" in file.shapes:
        # NeMo's LoRA recognizes a gated linear_fc1 only by the word "fast". Without it, it builds half of the linear.
        problems.append(
            f"base: activation={base['activation']!r}: stock NeMo's LoRA takes linear_fc1 for ungated; drop it"
        )
    problems.raise_if_any()
