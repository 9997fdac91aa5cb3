# SPDX-License-Identifier: Apache-2.0
"""Judges NeMo's keys in the configuration of a training: translates, removes or refuses those that differ here."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from nemo_tied_lora.errors import ConfigError
from nemo_tied_lora.planning.composing.dotted_keys import first_line, has_key, remove_key, value_of
from nemo_tied_lora.planning.composing.lora_tuning import SECTION, translate_lora_tuning
from nemo_tied_lora.planning.composing.nemo_keys import ADAPTER, FIXED, no_effect, other_scheme

__all__ = ["translate_lora", "translate_training"]

_SCHEDULE = "model.optim.sched"
_SAMPLING = "model.data.train_ds.concat_sampling_probabilities"


def translate_training(
    cfg: DictConfig, typed: Mapping[str, Any], in_file: Mapping[str, Any], notes: list[str]
) -> Iterator[str]:
    """Removes keys without effect from a training's configuration, and yields problems.

    Args:
        cfg: composed; changed in place.
        typed: the keys of the command line.
        in_file: the keys of the user's own YAML.
        notes: gets a line for each key whose value the user chose and that has no effect.
    """
    idle: dict[str, list[str]] = {}
    for key, value in {**in_file, **typed}.items():
        found = no_effect(key)
        if found is None:
            continue
        default, why = found
        if key in typed or value not in (default, None, {}):
            idle.setdefault(why, []).append(f"{key}={value}")
        remove_key(cfg, key)
    notes += [
        f"{', '.join(keys)}: {'has' if len(keys) == 1 else 'have'} no effect here: {why}" for why, keys in idle.items()
    ]
    yield from _other_schemes(cfg, typed, in_file, notes)
    for key, (needed, why) in FIXED.items():
        value = value_of(cfg, key)
        if value is not None and value != needed:
            yield f"{key}={value}: must stay {str(needed).lower()}; {why}"
    if has_key(cfg, _SCHEDULE) and value_of(cfg, _SCHEDULE) is None:
        remove_key(cfg, _SCHEDULE)  # NeMo keeps the rate constant without this section, and fails with null
    devices = value_of(cfg, "trainer.devices")
    if devices in (-1, "-1", "auto"):
        yield f"trainer.devices={devices}: the layout needs the number of ranks on each node; write it, or layout=tp8"
    _one_file_needs_no_probabilities(cfg)


def translate_lora(cfg: DictConfig, notes: list[str]) -> Iterator[str]:
    """Moves NeMo's `lora_tuning` to `tied_lora`, and yields problems."""
    found = value_of(cfg, SECTION)
    if not isinstance(found, DictConfig):
        if found is not None:
            yield f"{SECTION}={found}: must be a section of keys"
        remove_key(cfg, SECTION)
        return
    try:
        section = OmegaConf.to_container(found, resolve=True)
        own = OmegaConf.to_container(OmegaConf.select(cfg, ADAPTER) or OmegaConf.create(), resolve=True)
    except (OmegaConfBaseException, ValueError) as error:
        yield f"{SECTION}: {first_line(error)}"
        return
    remove_key(cfg, SECTION)
    assert isinstance(section, dict)
    assert isinstance(own, dict)
    if OmegaConf.select(cfg, "model.peft.restore_from_path") is not None:
        notes.append(f"{SECTION}: not read; the adapter of model.peft.restore_from_path has its own settings")
        return
    try:
        taken, told = translate_lora_tuning({str(k): v for k, v in section.items()}, own)  # type: ignore[arg-type]
    except ConfigError as error:
        yield from error.problems
        return
    notes += told
    for key, value in taken.items():
        OmegaConf.update(cfg, f"{ADAPTER}.{key}", value, force_add=True)


def _other_schemes(
    cfg: DictConfig, typed: Mapping[str, Any], in_file: Mapping[str, Any], notes: list[str]
) -> Iterator[str]:
    """Removes the sections of NeMo's other schemes. A typed key of one is refused: it was meant to change something."""
    left_out = []
    for key in {**in_file, **typed}:
        scheme = other_scheme(key)
        if scheme is None:
            continue
        if key in typed:
            yield f"{key}={typed[key]}: belongs to peft_scheme={scheme}, which is not trained here; write {ADAPTER}.rank"
        section = ".".join(key.split(".")[:3])
        if section not in left_out and key not in typed:
            left_out.append(section)
        remove_key(cfg, section)
    if left_out:
        notes.append(f"not read, because they belong to other schemes: {', '.join(left_out)}")


def _one_file_needs_no_probabilities(cfg: DictConfig) -> None:
    files = value_of(cfg, "model.data.train_ds.file_names")
    if value_of(cfg, _SAMPLING) is None and OmegaConf.is_list(files) and len(files) == 1:
        OmegaConf.update(cfg, _SAMPLING, [1.0])
