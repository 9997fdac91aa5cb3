# SPDX-License-Identifier: Apache-2.0
"""Refuses a text in place of true or false: Python takes every text for true, also "no" and "off". Needs no torch."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import lru_cache
from typing import Any

from nemo_tied_lora.errors import Problems
from nemo_tied_lora.planning.compose import compose_config, plain

__all__ = ["flag_problems"]

_OTHERS = ("preflight", "model.sequence_parallel")
"""Keys with a check of their own."""


def flag_problems(command: str, cfg: Mapping[str, Any]) -> Problems:
    """Checks every key that is true or false in the shipped configuration of the command. Null is allowed."""
    problems = Problems()
    for key in _flags(command):
        value: Any = cfg
        for name in key.split("."):
            value = value.get(name) if isinstance(value, Mapping) else None
        if value is not None and value not in (True, False):
            problems.append(f"{key}={value!r}: must be true or false")
    return problems


@lru_cache
def _flags(command: str) -> tuple[str, ...]:
    return tuple(key for key in _bools(plain(compose_config(command, []))) if key not in _OTHERS)


def _bools(section: Mapping[str, Any], prefix: str = "") -> Iterator[str]:
    for key, value in section.items():
        if isinstance(value, Mapping):
            yield from _bools(value, f"{prefix}{key}.")
        elif isinstance(value, bool):
            yield f"{prefix}{key}"
