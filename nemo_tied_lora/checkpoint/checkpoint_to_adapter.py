# SPDX-License-Identifier: Apache-2.0
"""The adapter in a training checkpoint: what it is, whether it is this run's, and how it becomes a `.nemo`."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from nemo_tied_lora.adapter.shapes import TargetSpec
from nemo_tied_lora.checkpoint.nemo_adapter_format import order_of_writing
from nemo_tied_lora.checkpoint.training_checkpoint import CheckpointError, read_description, read_tensors
from nemo_tied_lora.checkpoint.write_nemo_adapter import write_adapter
from nemo_tied_lora.config import TiedLoraConfig

__all__ = ["describe", "differences", "write_adapter_of"]


def describe(
    config: TiedLoraConfig, specs: Mapping[str, TargetSpec], facts: Mapping[str, Any], base: Mapping[str, Any]
) -> dict[str, Any]:
    """The adapter's configuration, the base's target shapes, and the facts that its `.nemo` would hold.

    Args:
        base: as `base_identity.describe_base` gives it.
    """
    return {
        "adapter": config.as_dict(),
        "targets": {t: {**dataclasses.asdict(s), "layers": list(s.layers)} for t, s in specs.items()},
        "facts": {**facts, "base": {**(facts.get("base") or {}), **base}},
    }


def differences(path: Path, saved: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """Why the checkpoint is not one of this run, a line each: another adapter, another base."""
    now = json.loads(json.dumps(now))  # as the saved one went through JSON: tuples are lists
    pairs = [
        *_changed("model.peft.tied_lora", saved["adapter"], now["adapter"]),
        *_changed("the base's targets", saved["targets"], now["targets"]),
        *_changed("the base", _identity(saved), _identity(now)),
    ]
    fix = "set name= or exp_manager.explicit_log_dir= to another folder, or undo the change"
    return [f"{path}: {what}: {old!r} in the checkpoint, {new!r} in this run; {fix}" for what, old, new in pairs]


def write_adapter_of(
    checkpoint: Path, output: Path, progress: Callable[[list[str]], Iterable[str]] = iter
) -> dict[str, Any]:
    """Writes the checkpoint's adapter as a `.nemo`, with the bits that the run would have saved; one process.

    Needs neither the base nor a GPU.

    Args:
        progress: goes through the tensors' names as they are written, and may show it.

    Returns:
        The checkpoint's description.

    Raises:
        CheckpointError: it is damaged. OSError: the file cannot be written.
    """
    description = read_description(checkpoint)
    try:
        config = TiedLoraConfig.from_mapping(description["adapter"])
        specs = {t: TargetSpec(**{**s, "layers": tuple(s["layers"])}) for t, s in description["targets"].items()}
        tensors = read_tensors(checkpoint, "adapter")
        arriving = ((name, tensors[name]) for name in progress(order_of_writing(config, specs)))
        write_adapter(output, config, specs, arriving, description["facts"])
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError([f"{checkpoint}: damaged: {type(error).__name__}: {error}"]) from error
    return description


def _identity(description: Mapping[str, Any]) -> dict[str, Any]:
    """Of the base, flat; where its file lies does not matter, and one fingerprint stands for all its weights."""
    return {
        key: value
        for key, value in _flat(description["facts"].get("base", {}))
        if key != "name" and not key.startswith("fingerprint.weights.")
    }


def _flat(section: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in section.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _changed(where: str, saved: Mapping[str, Any], now: Mapping[str, Any]) -> Iterator[tuple[str, Any, Any]]:
    for key in sorted({*saved, *now}):
        if saved.get(key) != now.get(key):
            yield f"{where}.{key}", saved.get(key), now.get(key)
