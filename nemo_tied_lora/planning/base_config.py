# SPDX-License-Identifier: Apache-2.0
"""Reads the base's configuration, from its `.nemo` or an adapter's record, and the adapter's section of a run's.

A file that is not whole, or no base that this package can adapt, is refused here, before a model is built.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from nemo_tied_lora.config import TiedLoraConfig
from nemo_tied_lora.errors import ConfigError, Problems
from nemo_tied_lora.planning.architecture import Architecture
from nemo_tied_lora.planning.base_weights import weight_problems
from nemo_tied_lora.planning.nemo_archive import NemoFiles
from nemo_tied_lora.planning.nemo_model_config import adapter_kind, nemo_config
from nemo_tied_lora.planning.versions import installed_version

__all__ = [
    "adapter_section",
    "base_model_config",
    "of_a_pattern",
    "other_architecture",
    "recorded_model_keys",
    "usable_base",
]


def adapter_section(peft: Mapping[str, Any]) -> TiedLoraConfig:
    """Returns `model.peft.tied_lora` as an adapter's configuration.

    Raises:
        ConfigError: with all problems.
    """
    problems = Problems()
    return problems.build(TiedLoraConfig.from_mapping, problems.section("model.peft.tied_lora", peft.get("tied_lora")))


def base_model_config(path: str | os.PathLike | None, key: str = "model.restore_from_path") -> dict[str, Any]:
    """Returns the `model_config.yaml` of a base `.nemo`: a tar, plain or compressed, or an unpacked folder.

    Args:
        key: the configuration key of the path, for messages.

    Raises:
        ConfigError: there is no path, no file, it is cut off or something else, or has no readable configuration.
    """
    if path is None:
        raise ConfigError([f"{key}: missing; name the base model's .nemo"])
    config, files = nemo_config(Path(str(path)), key)
    kind = adapter_kind(config, files)
    if kind is not None:
        raise ConfigError([f"{key}={path}: is {kind}, not a base model"])
    return config


def usable_base(path: str | os.PathLike | None, key: str = "model.restore_from_path") -> dict[str, Any]:
    """Returns `base_model_config`, if NeMo can build the model and this package can adapt it.

    Raises:
        ConfigError: as `base_model_config`; or a model of another class, not of Megatron-core, of a newer NeMo, or its
            weights are missing or cut off.
    """
    config = base_model_config(path, key)
    files = NemoFiles(Path(str(path)))
    problems = [*_model_problems(config), *_tokenizer_problems(config, files), *weight_problems(files)]
    Problems(f"{key}={path}: {problem}" for problem in problems).raise_if_any()
    return config


def other_architecture(path: str | os.PathLike, base: Mapping[str, Any]) -> list[str]:
    """One line for each size in which an adapter's recorded base differs from `base`.

    Args:
        path: a Tied-LoRA adapter's `.nemo`.
        base: the base's model_config.yaml.

    Raises:
        ConfigError: one of the two cannot be read.
    """
    description, _ = nemo_config(Path(path), "adapter")
    recorded = (description.get("base") or {}).get("architecture") or {}
    own = Architecture.from_model_config(base)
    return of_a_pattern(path, description) or [
        f"adapter={path}: was trained on a base with {size}={recorded[size]!r}, and this one has {getattr(own, size)!r}; "
        "name the base that it was trained on"
        for size in _SIZES
        if recorded.get(size) is not None and recorded[size] != getattr(own, size)
    ]


def of_a_pattern(path: str | os.PathLike, description: Mapping[str, Any]) -> list[str]:
    """One line if an adapter's base was a HybridModel that no base of NeMo is equal to: its layers' numbers are others.

    Args:
        path: the adapter, for the message.
        description: its model_config.yaml.
    """
    pattern = ((description.get("base") or {}).get("architecture") or {}).get("hybrid_layer_pattern")
    if pattern is None:
        return []
    return [
        f"adapter={path}: was trained on a HybridModel with hybrid_layer_pattern={pattern}, and a base of NeMo has attention "
        "and MLP in every layer; use it through Megatron-Bridge"
    ]


_SIZES = ("num_layers", "hidden_size", "ffn_hidden_size", "num_attention_heads", "num_query_groups", "kv_channels")
_MCORE = (
    "mcore_gpt is not set: this base is not a Megatron-core GPT; convert it with NeMo's converter, "
    "scripts/checkpoint_converters/convert_gpt_nemo_to_mcore.py"
)
_NO_BASE = re.compile("PromptLearning|AdapterLearning|AdapterPTuning|LoRA|PTuning|IA3|Reward")
_RELEASE = re.compile(r"(\d+)\.(\d+)")
_TESTED_NEMO = "2.4.1"


def _model_problems(config: Mapping[str, Any]) -> Iterator[str]:
    """What the model's configuration says that NeMo or this package cannot do."""
    target = str(config.get("target") or "")
    name = target.rpartition(".")[2]
    known = not target or target.startswith("nemo_tied_lora.")
    if not known and ("GPT" not in name or _NO_BASE.search(name)):
        yield f"is a {name} (target: {target}); only a GPT of NeMo, as MegatronGPTModel, can be the base"
    elif not config.get("mcore_gpt"):
        yield _MCORE
    stated, here = str(config.get("nemo_version") or ""), installed_version("nemo_toolkit") or _TESTED_NEMO
    made, reads = _RELEASE.match(stated), _RELEASE.match(here)
    if made and reads and tuple(map(int, made.groups())) > tuple(map(int, reads.groups())):
        yield f"was written by NeMo {stated}, newer than the NeMo {here} that reads it; install that, or save it with {here}"


def _tokenizer_problems(config: Mapping[str, Any], files: NemoFiles) -> Iterator[str]:
    """The tokenizer's files that the configuration names and the `.nemo` does not hold."""
    section = config.get("tokenizer")
    for name, value in _texts(section if isinstance(section, Mapping) else {}, "tokenizer"):
        if value.startswith(_INSIDE) and value.removeprefix(_INSIDE) not in files.sizes:
            yield f"is not whole: its {name} is {value.removeprefix(_INSIDE)}, which it does not hold"


_INSIDE = "nemo:"


def _texts(section: Mapping[str, Any], prefix: str) -> Iterator[tuple[str, str]]:
    for key, value in section.items():
        if isinstance(value, Mapping):
            yield from _texts(value, f"{prefix}.{key}")
        elif isinstance(value, str):
            yield f"{prefix}.{key}", value


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
