# SPDX-License-Identifier: Apache-2.0
"""Encodes Lightning's dictionaries as JSON: numbers, strings, lists, tuples, dictionaries, and small tensors."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy
import torch

__all__ = ["decode", "encode"]

_TAG = "~"


def encode(value: Any, where: str = "state") -> Any:
    """Returns `value` as plain JSON values; `decode` restores it, bit for bit.

    Args:
        where: its name, for messages.

    Raises:
        TypeError: it holds a value of another type. Nothing is pickled, so reading a checkpoint runs no code.
    """
    if value is None or isinstance(value, (bool, int, float, str)):
        return value.item() if isinstance(value, numpy.generic) else value
    if isinstance(value, numpy.generic):
        return value.item()
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, torch.Tensor):
        dtype = str(value.dtype).removeprefix("torch.")
        return {_TAG: "tensor", "dtype": dtype, "shape": list(value.shape), "values": value.flatten().tolist()}
    if isinstance(value, Mapping):
        items = {key: encode(item, f"{where}.{key}") for key, item in value.items()}
        if all(isinstance(key, str) for key in items) and _TAG not in items:
            return items
        return {_TAG: "dict", "items": [[encode(key, where), item] for key, item in items.items()]}
    if isinstance(value, (list, tuple)):
        listed = [encode(item, f"{where}[{index}]") for index, item in enumerate(value)]
        return listed if isinstance(value, list) else {_TAG: "tuple", "items": listed}
    raise TypeError(f"{where}: a {type(value).__qualname__} cannot be kept in a checkpoint")


def decode(value: Any) -> Any:
    """Returns what `encode` was given, with tensors on the CPU."""
    if isinstance(value, list):
        return [decode(item) for item in value]
    if not isinstance(value, dict):
        return value
    kind = value.get(_TAG)
    if kind == "tensor":
        return torch.tensor(value["values"], dtype=getattr(torch, value["dtype"])).reshape(value["shape"])
    if kind == "tuple":
        return tuple(decode(item) for item in value["items"])
    if kind == "dict":
        return {decode(key): decode(item) for key, item in value["items"]}
    return {key: decode(item) for key, item in value.items()}
