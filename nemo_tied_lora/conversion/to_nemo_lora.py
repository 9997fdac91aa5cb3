# SPDX-License-Identifier: Apache-2.0
"""Writes an adapter as stock NeMo's LoRA `.nemo`, in the single-rank form that NeMo's loader and deployment tools read.

model_config.yaml     the base's keys, and model.peft with peft_scheme: lora
model_weights.ckpt    model.decoder.layers.<i>.<block>.adapter_layer.<adapter>.linear_in.weight (r, in)
                                                                              .linear_out.weight (out, r)
"""

from __future__ import annotations

import io
import tarfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import yaml

from nemo_tied_lora.checkpoint.read_nemo_adapter import AdapterFile
from nemo_tied_lora.checkpoint.tar import write_tar
from nemo_tied_lora.conversion.hf_families import BaseSizes
from nemo_tied_lora.conversion.untie_to_lora import expand, layers_of, plain_alpha
from nemo_tied_lora.conversion.verify_export import Difference, largest_difference
from nemo_tied_lora.errors import ConfigError, Problems
from nemo_tied_lora.files import replace_file
from nemo_tied_lora.planning.nemo_archive import read_members

__all__ = ["ADAPTER_MODULES", "check_nemo_lora", "read_nemo_lora_members", "write_nemo_lora"]

_CONFIG, _STATE = "model_config.yaml", "model_weights.ckpt"
_MAX_CONFIG_BYTES = 4 << 20

ADAPTER_MODULES = {
    "linear_qkv": "self_attention.adapter_layer.lora_kqv_adapter",
    "linear_proj": "self_attention.adapter_layer.lora_dense_attention_adapter",
    "linear_fc1": "mlp.adapter_layer.lora_hto4h_adapter",
    "linear_fc2": "mlp.adapter_layer.lora_4htoh_adapter",
}
"""Target -> the name of NeMo's LoRA module below the layer."""

_TARGET_MODULES = {
    "linear_qkv": "attention_qkv",
    "linear_proj": "attention_dense",
    "linear_fc1": "mlp_fc1",
    "linear_fc2": "mlp_fc2",
}


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
    for lora in expand(file.config, file.shapes, file.state):
        name = _module_name(lora.layer, lora.target)
        state[f"{name}.linear_in.weight"] = lora.lora_A.clone()
        state[f"{name}.linear_out.weight"] = lora.lora_B.clone()
    content = io.BytesIO()
    torch.save(state, content)
    description = {**base, "peft": _peft_section(file)}
    members = {_CONFIG: yaml.safe_dump(description, sort_keys=False).encode(), _STATE: content.getvalue()}
    return replace_file(path, lambda handle: write_tar(handle, members))


def check_nemo_lora(path: Path, file: AdapterFile) -> Difference:
    """Reads the `.nemo` back and compares its updates, as NeMo's layers compute them, with the tied formula."""
    description, weights = read_nemo_lora_members(path)
    state = torch.load(io.BytesIO(weights), map_location="cpu", weights_only=True)
    section = yaml.safe_load(description)["peft"]["lora_tuning"]
    scale = section["alpha"] / section["adapter_dim"]

    def update(layer: int, target: str, x: torch.Tensor) -> torch.Tensor:
        name = _module_name(layer, target)
        A, B = (state[f"{name}.linear_{side}.weight"].to(x.dtype) for side in ("in", "out"))
        return scale * (B @ (A @ x))

    return largest_difference(file, update)


def read_nemo_lora_members(path: Path) -> tuple[bytes, bytes]:
    """(model_config.yaml, model_weights.ckpt) of stock NeMo's LoRA `.nemo`.

    Raises:
        ConfigError: the file is not a tar, or a member is missing, truncated, or claims to be larger than the file.
    """
    try:
        members = read_members(path, (_CONFIG, _STATE), max(_MAX_CONFIG_BYTES, path.stat().st_size))
    except (tarfile.TarError, OSError) as error:
        raise ConfigError([f"{path}: not a whole .nemo file: {error}"]) from error
    missing = [name for name in (_CONFIG, _STATE) if name not in members]
    if missing:
        raise ConfigError([f"{path}: {', '.join(missing)} is missing"])
    return members[_CONFIG], members[_STATE]


def _module_name(layer: int, target: str) -> str:
    return f"model.decoder.layers.{layer}.{ADAPTER_MODULES[target]}"


def _peft_section(file: AdapterFile) -> dict[str, Any]:
    """`model.peft` of a LoRA run of NeMo. `layer_selection` counts layers from 1."""
    return {
        "peft_scheme": "lora",
        "restore_from_path": None,
        "lora_tuning": {
            "variant": "nemo",
            "target_modules": [_TARGET_MODULES[target] for target in file.shapes],
            "adapter_dim": file.config.rank,
            "alpha": plain_alpha(file.config),
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
