# SPDX-License-Identifier: Apache-2.0
"""Translates NeMo's section `model.peft.lora_tuning` to `model.peft.tied_lora`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from nemo_tied_lora.config import INIT_METHODS, NEMO_TARGETS, PRESETS, TARGETS
from nemo_tied_lora.errors import Problems, is_whole_number

__all__ = ["SECTION", "translate_lora_tuning"]

SECTION = "model.peft.lora_tuning"
"""NeMo's section."""

# Hugging Face's names for the linears -> NeMo's.
_HUGGING_FACE = {
    **dict.fromkeys(("q_proj", "k_proj", "v_proj", "qkv_proj", "query_key_value"), "attention_qkv"),
    **dict.fromkeys(("o_proj", "out_proj"), "attention_dense"),
    **dict.fromkeys(("gate_proj", "up_proj", "gate_up_proj"), "mlp_fc1"),
    "down_proj": "mlp_fc2",
}
_KEYS = (
    "adapter_dim",
    "alpha",
    "adapter_dropout",
    "target_modules",
    "layer_selection",
    "column_init_method",
    "row_init_method",
    "variant",
    "weight_tying",
    "position_embedding_strategy",
    "dropout_position",
    "a2a_experimental",
)
_NEAR = {"dropout": "adapter_dropout", "lora_dropout": "adapter_dropout", "rank": "adapter_dim", "r": "adapter_dim"}
_NEAR |= {"dim": "adapter_dim", "lora_alpha": "alpha", "targets": "target_modules", "layers": "layer_selection"}


def translate_lora_tuning(section: Mapping[str, Any], own: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """Returns (keys of tied_lora, one line per thing to tell).

    Args:
        section: NeMo's section, resolved.
        own: `model.peft.tied_lora`, resolved. Its values win; null means not given.

    Raises:
        ConfigError: an unknown key, or a value that has no meaning here.
    """
    problems = Problems()
    for key, value in section.items():
        if key not in _KEYS:
            hint = f"write {_NEAR[key]}" if key in _NEAR else f"its keys are {', '.join(_KEYS)}"
            problems.append(f"{SECTION}.{key}={value!r}: NeMo does not read it; {hint}")
    if section.get("variant") not in (None, "nemo"):
        problems.append(f"{SECTION}.variant={section['variant']!r}: only nemo is possible: one A for q, k and v")
    rank, alpha = section.get("adapter_dim"), section.get("alpha")
    # null follows the rank, as NeMo's interpolation does
    follows = alpha == rank and own.get("alpha_rule") != "sqrt"
    found = {
        "rank": rank,
        "alpha": None if follows else alpha,
        "dropout": section.get("adapter_dropout") or None,
        "targets": _targets(section.get("target_modules"), problems),
        "layers": _layers(section.get("layer_selection"), problems),
        "init_A": _init("column_init_method", section, problems),
        "init_B": _init_of_b(section, own, problems),
    }
    problems.raise_if_any()
    taken = {key: value for key, value in found.items() if value is not None and own.get(key) is None}
    shown = ", ".join(f"model.peft.tied_lora.{key}={_yaml(value)}" for key, value in taken.items())
    notes = [f"{SECTION}: taken as {shown}{_other_defaults(found, own)}"]
    kept = [key for key, value in found.items() if value is not None and key not in taken and value != own[key]]
    if kept:
        notes.append(f"{SECTION}: not read where model.peft.tied_lora has its own value ({', '.join(kept)})")
    return taken, [*(notes if taken else notes[1:]), *_without_effect(section)]


def _other_defaults(found: Mapping[str, Any], own: Mapping[str, Any]) -> str:
    """What the note adds where neither section sets the rank or the targets: NeMo's defaults differ."""
    absent = {"rank": "8 (NeMo: adapter_dim=32)", "targets": "all four linears (NeMo: target_modules=[attention_qkv])"}
    here = [f"{key}: {text}" for key, text in absent.items() if found[key] is None and own.get(key) is None]
    return f"; not set, so the default here, {', '.join(here)}" if here else ""


def _without_effect(section: Mapping[str, Any]) -> list[str]:
    notes = []
    if section.get("weight_tying"):
        notes.append(
            f"{SECTION}.weight_tying=true: A and B are tied already, except with preset=lora and preset=adalora"
        )
    if section.get("position_embedding_strategy") is not None:
        notes.append(f"{SECTION}.position_embedding_strategy: has no effect; u and v tell the layers apart")
    if section.get("dropout_position") == "post" and section.get("adapter_dropout"):
        notes.append(f"{SECTION}.dropout_position=post: has no effect; dropout acts on the linear's input")
    if section.get("a2a_experimental"):
        notes.append(f"{SECTION}.a2a_experimental: has no effect; only tensors of the rank's width cross the network")
    return notes


def _targets(modules: Any, problems: Problems) -> list[str] | None:
    if modules is None:
        return None
    names = [modules] if isinstance(modules, str) else modules
    if not isinstance(names, list):
        problems.append(f"{SECTION}.target_modules={modules!r}: must be a list of {', '.join(NEMO_TARGETS)}")
        return None
    for name in names:
        if name not in NEMO_TARGETS and name not in TARGETS:
            right = _HUGGING_FACE.get(str(name))
            hint = f"NeMo's name is {right}" if right else f"choose from {', '.join(NEMO_TARGETS)}"
            problems.append(f"{SECTION}.target_modules: {name!r} is unknown; {hint}")
    expanded = {target for name in names for target in NEMO_TARGETS.get(name, (name,))}
    return [target for target in TARGETS if target in expanded]


def _layers(selection: Any, problems: Problems) -> list[int] | None:
    if selection is None:
        return None
    if not isinstance(selection, list) or not all(is_whole_number(layer) for layer in selection):
        problems.append(f"{SECTION}.layer_selection={selection!r}: must be a list of layer numbers, counted from 1")
        return None
    return [layer - 1 for layer in selection]


def _init(key: str, section: Mapping[str, Any], problems: Problems) -> str | None:
    method = section.get(key)
    if method is not None:
        problems.one_of(f"{SECTION}.{key}", method, INIT_METHODS)
    return None if method == "xavier" and key == "column_init_method" else method


def _init_of_b(section: Mapping[str, Any], own: Mapping[str, Any], problems: Problems) -> str | None:
    """B's init. NeMo's zero is left out: the one factor that starts at 0 is v where v is trained, else B."""
    method = _init("row_init_method", section, problems)
    preset = own.get("preset") or "tl6"
    trained = own.get("trained") or PRESETS.get(str(preset), {}).get("trained", ())
    if method == "zero" and ("v" in trained or "B" in trained):
        return None
    return method


def _yaml(value: Any) -> str:
    return f"[{', '.join(map(str, value))}]" if isinstance(value, list) else str(value)
