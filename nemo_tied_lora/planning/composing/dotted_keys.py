# SPDX-License-Identifier: Apache-2.0
"""Dotted keys of nested configurations."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

__all__ = ["first_line", "flat", "has_key", "remove_key", "value_of"]


def flat(section: Mapping[Any, Any], prefix: str = "") -> dict[str, Any]:
    """Maps dotted keys to values. An empty section is a value."""
    found: dict[str, Any] = {}
    for key, value in section.items():
        if isinstance(value, Mapping) and value:
            found |= flat(value, f"{prefix}{key}.")
        else:
            found[f"{prefix}{key}"] = value
    return found


def has_key(cfg: DictConfig, key: str) -> bool:
    """Whether a dotted key exists, whatever its value: null, ??? and a broken interpolation count."""
    section, _, last = key.rpartition(".")
    node = value_of(cfg, section) if section else cfg
    return isinstance(node, DictConfig) and last in list(node.keys())


def remove_key(cfg: DictConfig, key: str) -> None:
    """Removes a dotted key if it exists. What other keys take from it by interpolation stays, as a value."""
    if not has_key(cfg, key):
        return
    for user, raw in flat(OmegaConf.to_container(cfg, resolve=False)).items():  # type: ignore[arg-type]
        if isinstance(raw, str) and re.search(rf"\$\{{{re.escape(key)}[.}}]", raw) and not user.startswith(f"{key}."):
            OmegaConf.update(cfg, user, value_of(cfg, user))
    section, _, last = key.rpartition(".")
    node = value_of(cfg, section) if section else cfg
    del node[last]  # pop would resolve it


def value_of(cfg: DictConfig, key: str) -> Any:
    """Returns the value, resolved; None if it is missing or cannot be resolved."""
    try:
        return OmegaConf.select(cfg, key, throw_on_resolution_failure=False)
    except OmegaConfBaseException:
        return None


def first_line(error: Exception) -> str:
    """Returns the first line of an error's message that is not empty, or its type."""
    return next(line for line in [*str(error).splitlines(), type(error).__name__] if line.strip())
