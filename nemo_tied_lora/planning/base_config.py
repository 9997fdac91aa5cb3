# SPDX-License-Identifier: Apache-2.0
"""Reads the base's configuration, from its `.nemo` or an adapter's record, and the adapter's section of a run's."""

from __future__ import annotations

import os
import tarfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from nemo_tied_lora.config import TiedLoraConfig
from nemo_tied_lora.errors import ConfigError, Problems
from nemo_tied_lora.planning.nemo_archive import read_members

__all__ = ["adapter_section", "base_model_config", "recorded_model_keys"]


def adapter_section(peft: Mapping[str, Any]) -> TiedLoraConfig:
    """Returns `model.peft.tied_lora` as an adapter's configuration.

    Raises:
        ConfigError: with all problems.
    """
    problems = Problems()
    return problems.build(TiedLoraConfig.from_mapping, problems.section("model.peft.tied_lora", peft.get("tied_lora")))


def base_model_config(path: str | os.PathLike | None, key: str = "model.restore_from_path") -> dict[str, Any]:
    """Returns the `model_config.yaml` of a base `.nemo`: a tar, plain or gzipped, or an unpacked folder.

    Args:
        key: the configuration key of the path, for messages.

    Raises:
        ConfigError: there is no path, no file, or no readable configuration in it.
    """
    if path is None:
        raise ConfigError([f"{key}: missing; name the base model's .nemo"])
    try:
        config = _read_model_config(Path(str(path)))
    except FileNotFoundError:
        raise ConfigError([f"{key}={path}: no such file"]) from None
    except (tarfile.TarError, OSError, yaml.YAMLError) as error:
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise ConfigError([f"{key}={path}: not a .nemo file: {reason}"]) from None
    if not isinstance(config, dict) or not config:
        raise ConfigError([f"{key}={path}: holds no model_config.yaml with keys; not a .nemo model"])
    if (config.get("peft") or {}).get("peft_scheme") == "tied_lora" and "targets" in config:
        raise ConfigError([f"{key}={path}: is a Tied-LoRA adapter, not a base model"])
    return config


_CONFIG, _MAX_CONFIG_BYTES = "model_config.yaml", 4 << 20


def _read_model_config(path: Path) -> Any:
    if path.is_dir():
        return yaml.safe_load((path / _CONFIG).read_bytes())
    return yaml.safe_load(read_members(path, (_CONFIG,), _MAX_CONFIG_BYTES).get(_CONFIG, b""))


# Megatron's activation function, gated -> NeMo's word. NeMo's LoRA recognizes a gated linear by "fast".
_GATED_ACTIVATIONS = {"silu": "fast-swiglu", "gelu": "fast-geglu", "relu": "fast-reglu"}


def recorded_model_keys(description: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the base's model keys as recorded in an adapter's `model_config.yaml`; empty if it records none.

    The record holds NeMo's own keys, or the architecture under the names of Megatron's config.
    """
    record = description.get("base") or {}
    architecture = dict(record.get("architecture") or {})
    gated = architecture.pop("gated_linear_unit", None)
    if gated is not None:
        activation = str(architecture.get("activation"))
        architecture["activation"] = _GATED_ACTIVATIONS.get(activation, f"{activation}-glu") if gated else activation
        architecture["bias"] = architecture.pop("add_bias_linear", None)
        architecture["qkv_bias"] = architecture.pop("add_qkv_bias", None)
        architecture["rotary_percentage"] = architecture.pop("rotary_percent", None)
        architecture["normalization"] = str(architecture.get("normalization")).lower()
    own = {
        key: value for key, value in record.items() if key not in ("architecture", "fingerprint", "tokenizer", "name")
    }
    return {key: value for key, value in {**own, **architecture}.items() if value is not None}
