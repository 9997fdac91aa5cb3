# SPDX-License-Identifier: Apache-2.0
"""Reads `model_config.yaml` of any `.nemo`, a base's or an adapter's, and tells them apart. Needs no torch."""

from __future__ import annotations

import os
import re
import tarfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from nemo_tied_lora.config import TiedLoraConfig
from nemo_tied_lora.errors import ConfigError
from nemo_tied_lora.planning.foreign_models import not_a_nemo
from nemo_tied_lora.planning.nemo_archive import NemoFiles, read_members

__all__ = ["adapter_kind", "adapter_problems", "nemo_config", "recorded_config", "recorded_precision"]

_CONFIG, _MAX_CONFIG_BYTES = "model_config.yaml", 4 << 20
_TIED_STATE, _WEIGHTS = "adapter.safetensors", "model_weights.ckpt"
_HEAD_BYTES = 1 << 20
_NO_SECTION = (
    f"its {_CONFIG} has no peft.tied_lora, which says what the adapter is; name the file as tied-lora finetune wrote it, or "
    "write it again: tied-lora convert-checkpoint"
)


def nemo_config(path: Path, key: str) -> tuple[dict[str, Any], NemoFiles]:
    """Returns (model_config.yaml, the files) of a whole `.nemo`, packed or unpacked.

    Args:
        key: the configuration key of the path, for messages.

    Raises:
        ConfigError: there is no file, it is something else, it is cut off, or its configuration cannot be read.
    """
    try:
        if not path.exists():
            hub = "; a model of the Hugging Face hub has to be downloaded, then tied-lora import from=hf-base"
            is_hub = re.fullmatch(r"[\w.-]+/[\w.-]+", str(path)) and not path.parent.exists()
            raise ConfigError([f"{key}={path}: no such file{hub if is_hub else ''}"])
        other = not_a_nemo(path)
        if other is not None:
            raise ConfigError([f"{key}={path}: {other}"])
        files = NemoFiles(path)
        if _CONFIG not in files.sizes:
            known = ", ".join(sorted(files.sizes)[:4]) or "nothing"
            raise ConfigError([f"{key}={path}: holds no {_CONFIG}, so it is no .nemo of NeMo; it holds {known}"])
        config = yaml.safe_load(_content(path))
    except (tarfile.TarError, OSError) as error:
        raise ConfigError([f"{key}={path}: not a whole .nemo file: {_line(error)}"]) from None
    except (yaml.YAMLError, ValueError) as error:
        if isinstance(error, ConfigError):
            raise
        raise ConfigError([f"{key}={path}: its {_CONFIG} is not YAML: {_line(error)}"]) from None
    if not isinstance(config, dict) or not config:
        raise ConfigError([f"{key}={path}: its {_CONFIG} holds no keys, so it is no .nemo of a model"])
    return config, files


def adapter_kind(config: Mapping[str, Any], files: NemoFiles) -> str | None:
    """Returns "a Tied-LoRA adapter" or "a stock NeMo adapter (lora)"; None for a base."""
    peft = config.get("peft")
    scheme = peft.get("peft_scheme") if isinstance(peft, Mapping) else None
    if _TIED_STATE in files.sizes or (scheme == "tied_lora" and "targets" in config):
        return "a Tied-LoRA adapter"
    if scheme in (None, "none", "tied_lora") or _WEIGHTS not in files.sizes or not files.can_seek:
        return None
    # torch.save writes the names of the tensors first. A model that was tuned whole names its embedding too.
    head = files.read(_WEIGHTS, 0, _HEAD_BYTES)
    return f"a stock NeMo adapter ({scheme})" if b"adapter_layer" in head and b"word_embeddings" not in head else None


def adapter_problems(path: object, key: str) -> list[str]:
    """What is wrong with a Tied-LoRA adapter's `.nemo`, as far as names and sizes tell."""
    if path is None:
        return [f"{key}=null: missing; name an adapter's .nemo"]
    place = Path(str(path))
    if place.is_dir():
        other = not_a_nemo(place) or "is a folder; name the .nemo file"
        return [f"{key}={path}: {other}"]
    try:
        config, files = nemo_config(place, key)
    except ConfigError as error:
        return list(error.problems)
    kind = adapter_kind(config, files)
    if kind is None:
        return [f"{key}={path}: is a base model, not an adapter"]
    if _TIED_STATE not in files.sizes:
        remedy = f"tied-lora import from=lora path={path} makes a tied one of it"
        return [f"{key}={path}: is {kind}, not a Tied-LoRA adapter; {remedy}"]
    return [f"{key}={path}: {_NO_SECTION}"] if _section(config) is None else []


def recorded_config(path: str | os.PathLike) -> TiedLoraConfig:
    """The configuration that a Tied-LoRA adapter's `.nemo` records.

    Raises:
        ConfigError: the file cannot be read, or records none.
    """
    section = _section(nemo_config(Path(path), "adapter")[0])
    if section is None:
        raise ConfigError([f"adapter={path}: {_NO_SECTION}"])
    return TiedLoraConfig.from_mapping(section)


def recorded_precision(path: str | os.PathLike) -> str | None:
    """What a Tied-LoRA adapter's base was held in when it was trained, as "nf4/64" or "bfloat16". None: an older file.

    Raises:
        ConfigError: the file cannot be read.
    """
    precision = nemo_config(Path(path), "adapter")[0].get("base_precision")
    return precision if isinstance(precision, str) else None


def _section(config: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """The adapter's configuration in its file's; None if it is missing."""
    peft = config.get("peft")
    section = peft.get("tied_lora") if isinstance(peft, Mapping) else None
    return section if isinstance(section, Mapping) else None


def _content(path: Path) -> bytes:
    if path.is_dir():
        return (path / _CONFIG).read_bytes()
    return read_members(path, (_CONFIG,), _MAX_CONFIG_BYTES).get(_CONFIG, b"")


def _line(error: Exception) -> str:
    """The error in one line."""
    return " ".join(str(error).split()) or type(error).__name__
