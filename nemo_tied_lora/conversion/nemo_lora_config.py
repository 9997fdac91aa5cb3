# SPDX-License-Identifier: Apache-2.0
"""Reads the configuration of stock NeMo's LoRA `.nemo`. Accepts only what is known to be plain LoRA. Imports no torch.

model_config.yaml     the base's keys, and model.peft
model_weights.ckpt    the tensors, in the single-rank form
"""

from __future__ import annotations

import tarfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import yaml

from nemo_tied_lora.errors import ConfigError, Problems, is_number, is_whole_number
from nemo_tied_lora.planning.nemo_archive import read_members

__all__ = [
    "ADAPTER_MODULES",
    "CONFIG",
    "STATE",
    "TARGET_MODULES",
    "NemoLoraConfig",
    "read_members_of",
    "read_nemo_lora_config",
]

CONFIG, STATE = "model_config.yaml", "model_weights.ckpt"
_MAX_CONFIG_BYTES = 4 << 20

ADAPTER_MODULES = {
    "linear_qkv": "self_attention.adapter_layer.lora_kqv_adapter",
    "linear_proj": "self_attention.adapter_layer.lora_dense_attention_adapter",
    "linear_fc1": "mlp.adapter_layer.lora_hto4h_adapter",
    "linear_fc2": "mlp.adapter_layer.lora_4htoh_adapter",
}
"""Target -> the name of NeMo's LoRA module below the layer."""

TARGET_MODULES = {
    "linear_qkv": "attention_qkv",
    "linear_proj": "attention_dense",
    "linear_fc1": "mlp_fc1",
    "linear_fc2": "mlp_fc2",
}
"""Target -> NeMo's word for it in `target_modules`."""
_GROUPS = {
    "attention": ("attention_qkv", "attention_dense"),
    "mlp": ("mlp_fc1", "mlp_fc2"),
    "all": tuple(TARGET_MODULES.values()),
}


class NemoLoraConfig:
    """`model.peft.lora_tuning` of a plain LoRA.

    Args:
        section: the section, checked by `read_nemo_lora_config`.
    """

    def __init__(self, section: Mapping[str, Any]):
        self.rank = int(section["adapter_dim"])
        alpha = section.get("alpha")
        self.scale = (self.rank if alpha is None else alpha) / self.rank
        words = section.get("target_modules") or ("attention_qkv",)
        self._words = {one for word in words for one in _GROUPS.get(word, (word,))}
        self._layers = section.get("layer_selection")

    def is_target(self, module: str) -> bool:
        """Whether NeMo builds a LoRA there. `layer_selection` counts layers from 1."""
        layer, _, linear = module.partition(".")
        target = next((target for target, name in ADAPTER_MODULES.items() if name == linear), None)
        return TARGET_MODULES.get(target or "") in self._words and (not self._layers or int(layer) + 1 in self._layers)


def read_nemo_lora_config(path: Path) -> tuple[dict[str, Any], NemoLoraConfig]:
    """(all keys of model_config.yaml, the LoRA's own).

    Raises:
        ConfigError: the file is not NeMo's LoRA of the single-rank form, or holds a value with which it is not known to
            be plain LoRA. Lists every such key.
    """
    members = read_members_of(path)
    try:
        description = yaml.safe_load(members[CONFIG])
    except yaml.YAMLError as error:
        raise ConfigError([f"path={path}: its {CONFIG} cannot be read: {str(error).splitlines()[0]}"]) from error
    peft = (description.get("peft") if isinstance(description, dict) else None) or {}
    section = peft.get("lora_tuning") if isinstance(peft, dict) else None
    if not isinstance(section, dict):
        raise ConfigError([f"path={path}: its {CONFIG} has no peft.lora_tuning; this is not stock NeMo's LoRA"])
    scheme = peft.get("peft_scheme")
    if scheme not in ("lora", "qlora"):
        raise ConfigError([f"path={path}: peft_scheme={scheme!r}: only lora and qlora can be fitted"])
    problems = Problems()
    for key, value in section.items():
        harmless, fix = _KNOWN_KEYS.get(
            key, (_off, "this release does not know it; remove it if it changes no update")
        )
        if not harmless(value):
            problems.append(f"path={path}: lora_tuning.{key}={value!r}: {fix}")
    if "adapter_dim" not in section:
        problems.append(f"path={path}: lora_tuning.adapter_dim is missing; it must be the rank")
    problems.raise_if_any()
    return description, NemoLoraConfig(section)


def read_members_of(path: Path) -> dict[str, bytes]:
    """`model_config.yaml` and `model_weights.ckpt` of stock NeMo's LoRA `.nemo`.

    Raises:
        ConfigError: the file is not a tar, or a member is missing, truncated, or claims to be larger than the file.
    """
    try:
        members = read_members(path, (CONFIG, STATE), max(_MAX_CONFIG_BYTES, path.stat().st_size))
        missing = [name for name in (CONFIG, STATE) if name not in members]
        held = _names(path) if missing else []
    except (tarfile.TarError, OSError) as error:
        what = "" if path.suffix == ".nemo" else "; for peft's LoRA, name its folder"
        raise ConfigError(
            [f"{path}: not a whole .nemo file: {str(error).splitlines()[0].rstrip(': ')}{what}"]
        ) from error
    if missing:
        raise ConfigError([f"{path}: {', '.join(missing)} is missing; {_what_else(held)}"])
    return members


def _names(path: Path) -> list[str]:
    with tarfile.open(path) as tar:
        return [name.removeprefix("./") for name in tar.getnames()]


def _what_else(held: list[str]) -> str:
    """What a `.nemo` is that does not hold NeMo's LoRA of one rank."""
    if "adapter.safetensors" in held:
        return "this is a Tied-LoRA adapter already"
    if any(name.startswith(("mp_rank_", "tp_rank_")) for name in held):
        return "it holds one file per model-parallel rank; save the LoRA at tensor and pipeline parallel 1"
    if any(name.startswith("model_weights/") for name in held):
        return (
            "it holds a distributed checkpoint: a whole model, or a LoRA of another form; a LoRA must be in one "
            "model_weights.ckpt"
        )
    return "this is not stock NeMo's LoRA"


def _off(value: Any) -> bool:
    return value is None or value is False or (isinstance(value, (str, list, dict)) and not value)


def _alpha(value: Any) -> bool:
    return value is None or (is_number(value) and value > 0)


def _words(value: Any) -> bool:
    known = {*TARGET_MODULES.values(), *_GROUPS}
    return _off(value) or (isinstance(value, list) and all(word in known for word in value))


def _any(value: Any) -> bool:
    return True


_KNOWN_KEYS: Mapping[str, tuple[Callable[[Any], bool], str]] = {
    "variant": (lambda value: value in (None, "nemo"), "only variant nemo can be read"),
    "adapter_dim": (is_whole_number, "must be a whole number of at least 1"),
    "alpha": (_alpha, "must be null or a number greater than 0: with 0 the LoRA changes nothing"),
    "target_modules": (_words, f"must be a list of {', '.join([*TARGET_MODULES.values(), *_GROUPS])}"),
    "layer_selection": (
        lambda value: _off(value) or (isinstance(value, list) and all(is_whole_number(n) for n in value)),
        "must be null or a list of layers, counted from 1",
    ),
    "weight_tying": (_off, "NeMo's tied LoRA adds position embeddings; train it with weight_tying=false"),
    "position_embedding_strategy": (_off, "only weight_tying=true reads it, which cannot be fitted"),
    "adapter_dropout": (_any, ""),
    "column_init_method": (_any, ""),
    "row_init_method": (_any, ""),
    "dropout_position": (_any, ""),
    "a2a_experimental": (_any, ""),
}
"""Key of `lora_tuning` -> whether a value is harmless, and what a user can do if it is not."""
