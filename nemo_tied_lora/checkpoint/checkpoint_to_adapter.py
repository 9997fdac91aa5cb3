# SPDX-License-Identifier: Apache-2.0
"""Describes the adapter in a training checkpoint, compares it with a run's, and writes it as a `.nemo`."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from nemo_tied_lora.adapter.rank_budget.masks import by_name
from nemo_tied_lora.adapter.shapes import LinearShape
from nemo_tied_lora.checkpoint.nemo_adapter_packing import order_of_writing
from nemo_tied_lora.checkpoint.training_checkpoint import CheckpointError, read_description, read_tensors
from nemo_tied_lora.checkpoint.write_nemo_adapter import write_adapter
from nemo_tied_lora.config import TiedLoraConfig

__all__ = ["describe", "differences", "write_adapter_of"]


_FIELDS_SINCE = {"alpha_rule": "rank"}
"""What a checkpoint without these fields means: it is older than they are."""


def describe(
    config: TiedLoraConfig, shapes: Mapping[str, LinearShape], facts: Mapping[str, Any], base: Mapping[str, Any]
) -> dict[str, Any]:
    """Returns the adapter's configuration, the shapes of its linears, and the facts that its `.nemo` would hold.

    Args:
        base: as `base_identity.describe_base` returns it.
    """
    return {
        "adapter": config.as_dict(),
        "targets": {group: shape.to_dict() for group, shape in shapes.items()},
        "facts": {**facts, "base": {**(facts.get("base") or {}), **base}},
    }


def differences(path: Path, saved: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """Returns one line per difference between a checkpoint's adapter and base and a run's.

    Args:
        path: the checkpoint, for messages.
        saved, now: descriptions by `describe`: the checkpoint's, read from JSON, and the run's.
    """
    now = json.loads(json.dumps(now))  # like the saved one: tuples become lists
    pairs = [
        *_changed("model.peft.tied_lora", {**_FIELDS_SINCE, **saved["adapter"]}, now["adapter"]),
        *_changed("the base's targets", saved["targets"], now["targets"]),
        *_changed("the base", _identity(saved), _identity(now)),
        *_changed("model", *({"base_quantization": _quantized_to(each)} for each in (saved, now))),
    ]
    fix = "set name= or exp_manager.explicit_log_dir= to another folder, or undo the change"
    return [f"{path}: {what}: {old!r} in the checkpoint, {new!r} in this run; {fix}" for what, old, new in pairs]


def write_adapter_of(
    checkpoint: Path, output: Path, progress: Callable[[list[str]], Iterable[str]] = iter
) -> dict[str, Any]:
    """Writes the checkpoint's adapter as a `.nemo`, with the same bits that the run would have saved.

    Runs in one process, without the base or a GPU.

    Args:
        progress: iterates over the tensors' names while they are written, as `tqdm` does.

    Returns:
        The checkpoint's description.

    Raises:
        CheckpointError: the checkpoint is damaged. OSError: the file cannot be written.
    """
    description = read_description(checkpoint)
    try:
        config = TiedLoraConfig.from_mapping(description["adapter"])
        shapes = {group: LinearShape.from_dict(stored) for group, stored in description["targets"].items()}
        tensors = read_tensors(checkpoint, "adapter")
        arriving = ((name, tensors[name]) for name in progress(order_of_writing(config, shapes)))
        budget = read_tensors(checkpoint, "rank_budget")
        masks = by_name(budget["mask"], shapes) if budget else None
        write_adapter(output, config, shapes, arriving, description["facts"], masks)
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError([f"{checkpoint}: damaged: {type(error).__name__}: {error}"]) from error
    return description


def _identity(description: Mapping[str, Any]) -> dict[str, Any]:
    """The base's facts, flat. Excludes its file's name, and the checksums that its fingerprint's `value` combines."""
    return {
        key: value
        for key, value in _flat(description["facts"].get("base", {}))
        if key != "name" and not key.startswith("fingerprint.weights.")
    }


def _quantized_to(description: Mapping[str, Any]) -> str | None:
    """What the base's linears were quantised to. None: they have a dtype, or the checkpoint is older than this record."""
    precision = str(description["facts"].get("base_precision"))
    return precision if "/" in precision else None


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
