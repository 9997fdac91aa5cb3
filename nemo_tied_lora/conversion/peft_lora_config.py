# SPDX-License-Identifier: Apache-2.0
"""Reads peft's adapter_config.json. Accepts only keys and values with which the adapter is known to be plain LoRA.

Imports no torch. peft adds keys with each release, and some of them change what A and B mean. So a key that is not in
the table is refused, unless it is switched off.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from nemo_tied_lora.errors import ConfigError, Problems, is_number, is_whole_number

__all__ = ["KNOWN_KEYS", "alpha_of", "is_target", "rank_of", "read_peft_config", "scale_of"]

CONFIG = "adapter_config.json"

_MERGE = "merge it into its base with peft's merge_and_unload, and import the result with from=hf-base"
_CHANGES_BASE = (
    "it starts by changing the base, so its A and B are wrong on the plain base; convert it with peft: "
    "model.save_pretrained(folder, path_initial_model_for_weight_conversion=...)"
)
_PLAIN_STARTS = ("gaussian", "eva", "orthogonal")
_BASE_CHANGING_STARTS = ("pissa", "olora", "corda", "lora_ga")


def _off(value: Any) -> bool:
    return value is None or value is False or (isinstance(value, (str, list, tuple, dict)) and not value)


def _any(value: Any) -> bool:
    return True


def _plain_start(value: Any) -> bool:
    return value is None or isinstance(value, bool) or str(value).lower() in _PLAIN_STARTS


def _numbers(value: Any) -> bool:
    return _off(value) or (isinstance(value, Mapping) and all(is_number(n) and n > 0 for n in value.values()))


def _ranks(value: Any) -> bool:
    return _off(value) or (isinstance(value, Mapping) and all(is_whole_number(n) for n in value.values()))


def _names(value: Any) -> bool:
    return (
        _off(value) or isinstance(value, str) or (isinstance(value, list) and all(isinstance(n, str) for n in value))
    )


def _layers(value: Any) -> bool:
    listed = isinstance(value, list) and all(is_whole_number(n, 0) for n in value)
    return _off(value) or is_whole_number(value, 0) or listed


_Known = tuple[Callable[[Any], bool], str]

KNOWN_KEYS: Mapping[str, _Known] = {
    "peft_type": (lambda value: value == "LORA", "only LORA can be fitted; train a LoRA, or " + _MERGE),
    "task_type": (
        lambda value: value in (None, "CAUSAL_LM"),
        "a NeMo GPT generates text: null or CAUSAL_LM is needed",
    ),
    # What the update is.
    "r": (is_whole_number, "must be a whole number of at least 1"),
    "lora_alpha": (
        lambda value: is_number(value) and value > 0,
        "must be a number greater than 0: with 0 the LoRA changes nothing; to subtract a LoRA, import it with the "
        "positive value and merge it with a negative weight",
    ),
    "use_rslora": (lambda value: value in (None, True, False), "must be true or false"),
    "rank_pattern": (_ranks, "must give whole numbers of at least 1"),
    "alpha_pattern": (_numbers, "must give numbers greater than 0"),
    "init_lora_weights": (_plain_start, ""),
    # Where it is: the names of the tensors are compared with these.
    "target_modules": (_names, "must be a list of names or a pattern"),
    "exclude_modules": (_names, "must be a list of names or a pattern"),
    "layers_to_transform": (_layers, "must be a layer's number, or a list of them"),
    "layers_pattern": (_names, "must be a name or a list of names"),
    # Where it came from.
    "base_model_name_or_path": (_any, ""),
    "revision": (_any, ""),
    "auto_mapping": (_any, ""),
    "peft_version": (_any, ""),
    "inference_mode": (_any, ""),
    # No effect on the trained update: training alone, other kinds of start, or what is read only beside a refused key.
    "lora_dropout": (_any, ""),
    "fan_in_fan_out": (_any, ""),
    "runtime_config": (_any, ""),
    "ensure_weight_tying": (_any, ""),
    "megatron_core": (_any, ""),
    "qalora_group_size": (_any, ""),
    "loftq_config": (_any, ""),
    "eva_config": (_any, ""),
    "corda_config": (_any, ""),
    "lora_ga_config": (_any, ""),
    # Features beyond plain LoRA.
    "bias": (lambda value: value in (None, "none"), f"a tied adapter trains no biases; {_MERGE}"),
    "lora_bias": (_off, f"a tied adapter has no biases; {_MERGE}"),
    "use_dora": (_off, f"a tied adapter has no magnitudes; {_MERGE}"),
    "modules_to_save": (_off, f"a tied adapter holds no whole weights; {_MERGE}"),
    "trainable_token_indices": (_off, f"a tied adapter holds no rows of the embedding; {_MERGE}"),
    "layer_replication": (_off, f"the LoRA has other layers than its base; {_MERGE}"),
    "target_parameters": (_off, f"it adapts parameters that are not linears; {_MERGE}"),
    "kasa_config": (_off, f"it cuts singular values off the base; {_MERGE}"),
    "use_bdlora": (_off, f"its A or B are blocks of a diagonal; {_MERGE}"),
    "use_qalora": (_off, "its A sees groups of inputs, of a quantized base; a tied adapter cannot represent it"),
    "alora_invocation_tokens": (_off, "it is active only after these tokens; a tied adapter is active on all"),
    "arrow_config": (_off, "it routes each token to one of several LoRAs; import these one by one"),
    "monteclora_config": (_off, "its update is drawn at random; a tied adapter cannot represent it"),
    "velora_config": (_off, "its file holds more than A and B; train a plain LoRA"),
    "megatron_config": (_off, "it adapts Megatron's own linears, not a Hugging Face model; train a plain LoRA"),
}
"""Key of peft's LoraConfig -> whether a value is harmless, and what a user can do if it is not."""


def read_peft_config(folder: Path) -> dict[str, Any]:
    """adapter_config.json of a plain LoRA.

    Raises:
        ConfigError: it is missing or damaged, or holds a value with which the adapter is not known to be plain LoRA.
            Lists every such key.
    """
    config = _json(folder)
    where, problems = f"path={folder}: {CONFIG}", Problems()
    if config.get("peft_type") != "LORA":  # other kinds have other keys
        raise ConfigError([f"{where}: peft_type={config.get('peft_type')!r}: {KNOWN_KEYS['peft_type'][1]}"])
    for key in ("r", "lora_alpha"):
        if key not in config:
            problems.append(f"{where}: {key} is missing; it {KNOWN_KEYS[key][1]}")
    for key, value in config.items():
        harmless, fix = KNOWN_KEYS.get(key, (_off, _unknown(key)))
        if not harmless(value):
            problems.append(
                f"{where}: {key}={_short(value)}: {_start_fix(value) if key == 'init_lora_weights' else fix}"
            )
    for key in ("rank_pattern", "alpha_pattern", "target_modules", "exclude_modules", "layers_pattern"):
        problems += _bad_patterns(where, key, config.get(key))
    problems.raise_if_any()
    return config


def rank_of(config: Mapping[str, Any], module: str) -> int:
    """The rank of a linear, named as in the Hugging Face model."""
    return int(_by_pattern(config.get("rank_pattern"), module, config["r"]))


def alpha_of(config: Mapping[str, Any], module: str) -> float:
    """The alpha of a linear."""
    return float(_by_pattern(config.get("alpha_pattern"), module, config["lora_alpha"]))


def scale_of(config: Mapping[str, Any], module: str) -> float:
    """The factor of a linear's update: alpha / r, or alpha / sqrt(r) with `use_rslora`."""
    rank = rank_of(config, module)
    return alpha_of(config, module) / (rank**0.5 if config.get("use_rslora") else rank)


def is_target(config: Mapping[str, Any], module: str) -> bool:
    """Whether peft puts a LoRA on this linear of a layer."""
    excluded, wanted = config.get("exclude_modules") or [], config["target_modules"]
    if isinstance(excluded, str):
        if re.fullmatch(excluded, module):
            return False
    elif _listed(excluded, module):
        return False
    if isinstance(wanted, str):
        return wanted.lower() == "all-linear" or re.fullmatch(wanted, module) is not None
    if module in wanted:
        return True
    layers = config.get("layers_to_transform")
    if not _listed(wanted, module) or layers is None or layers == []:
        return _listed(wanted, module)
    patterns = config.get("layers_pattern") or [r"[^.]*"]
    patterns = [patterns] if isinstance(patterns, str) else patterns
    found = next((m for p in patterns if (m := re.match(rf"(?:^|.*?\.){p}\.(\d+)\.", module))), None)
    return found is not None and int(found[1]) in ([layers] if isinstance(layers, int) else layers)


def _listed(names: list[str], module: str) -> bool:
    return module in names or any(module.endswith(f".{name}") for name in names)


def _by_pattern(patterns: Mapping[str, Any] | None, module: str, default: Any) -> Any:
    """The value of the first pattern that matches the end of the linear's name."""
    for pattern, value in (patterns or {}).items():
        if re.match(rf"(.*\.)?({pattern})$", module):
            return value
    return default


def _bad_patterns(where: str, key: str, value: Any) -> Iterator[str]:
    """peft reads these keys, and a text as target_modules, as regular expressions."""
    if isinstance(value, str):
        patterns = [value]
    elif key in ("target_modules", "exclude_modules") or not isinstance(value, (list, Mapping)):
        patterns = []
    else:
        patterns = [str(pattern) for pattern in value]
    for pattern in patterns:
        try:
            re.compile(pattern)
        except re.error as error:
            yield f"{where}: {key}={pattern!r}: not a regular expression: {error}"


def _start_fix(value: Any) -> str:
    if str(value).lower().startswith("loftq"):
        return f"its A and B correct a base that LoftQ has quantized, so they are wrong on the plain base; {_MERGE}"
    if str(value).lower().startswith(_BASE_CHANGING_STARTS):
        return _CHANGES_BASE
    return (
        "this release does not know this start, which may change the base; true, false, gaussian, eva and orthogonal "
        "do not. Convert it with peft: model.save_pretrained(folder, path_initial_model_for_weight_conversion=...)"
    )


def _unknown(key: str) -> str:
    return f"this release does not know this feature of peft; if {key} does not change what A and B mean, remove it"


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def _json(folder: Path) -> dict[str, Any]:
    path = folder / CONFIG
    if not path.is_file():
        raise ConfigError([f"path={folder}: holds no {CONFIG}; {_what_else(folder)}"])
    try:
        value = json.loads(path.read_text(encoding="utf-8-sig"))
    except (OSError, ValueError) as error:
        raise ConfigError([f"{path}: cannot be read: {error}; this is not a peft adapter"]) from error
    if not isinstance(value, dict) or not value:
        raise ConfigError([f"{path}: holds no keys; this is not a peft adapter"])
    return value


def _what_else(folder: Path) -> str:
    """What a folder is that is not peft's."""
    below = sorted(path.parent.name for path in folder.glob(f"*/{CONFIG}"))
    if below:
        return f"name the adapter's own folder: path={folder / below[-1]}"
    if (folder / "config.json").is_file():
        return "this is a Hugging Face model, not a LoRA; import it with from=hf-base"
    return "name peft's folder, as its save_pretrained writes it, or NeMo's LoRA .nemo"
