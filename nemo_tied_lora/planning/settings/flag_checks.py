# SPDX-License-Identifier: Apache-2.0
"""Compares the kinds of values with those of the shipped configuration: sections, and true or false. Needs no torch.

A value in place of a section would end in an AttributeError. A text in place of true or false is true for Python, also
"no" and "off".
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import lru_cache
from typing import Any

from nemo_tied_lora.errors import Problems
from nemo_tied_lora.planning.composing.compose import compose_config, plain

__all__ = ["flag_problems", "section_problems"]

_OTHERS = ("preflight", "model.sequence_parallel")
"""Keys with a check of their own."""


_NEEDED = (
    *("trainer", "exp_manager", "model", "model.peft", "model.optim", "model.tokenizer"),
    *("model.data", "model.data.train_ds", "model.data.validation_ds", "model.data.test_ds"),
)
"""Sections that must not be null or removed, if the shipped configuration has them."""


def section_problems(command: str, cfg: Mapping[str, Any]) -> Problems:
    """Checks that every section of the shipped configuration of the command is a section. Call it before other checks."""
    problems = Problems()
    for key in _kinds(command)[1]:
        value = _value(cfg, key)
        if not isinstance(value, Mapping) and (value is not None or key in _NEEDED):
            problems.append(f"{key}={value!r}: must be a section of keys")
    return problems


def flag_problems(command: str, cfg: Mapping[str, Any]) -> Problems:
    """Checks every key that is true or false in the shipped configuration of the command. Null is allowed."""
    problems = Problems()
    for key in _kinds(command)[0]:
        value = _value(cfg, key)
        if value is not None and value not in (True, False):
            problems.append(f"{key}={value!r}: must be true or false")
    return problems


def _value(cfg: Mapping[str, Any], key: str) -> Any:
    value: Any = cfg
    for name in key.split("."):
        value = value.get(name) if isinstance(value, Mapping) else None
    return value


@lru_cache
def _kinds(command: str) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """(the keys that are true or false, the sections) of the shipped configuration."""
    found = dict(_walk(plain(compose_config(command, []))))
    flags = (key for key, value in found.items() if isinstance(value, bool) and key not in _OTHERS)
    return tuple(flags), tuple(key for key, value in found.items() if isinstance(value, Mapping))


def _walk(section: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in section.items():
        yield f"{prefix}{key}", value
        if isinstance(value, Mapping):
            yield from _walk(value, f"{prefix}{key}.")
