# SPDX-License-Identifier: Apache-2.0
"""Replaces names in upstream modules. Each switch is a table of patches: where, which name, by what, and why."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

__all__ = ["Patch", "apply"]

_MISSING = object()
_applied: set[str] = set()


@dataclass(frozen=True, kw_only=True)
class Patch:
    """One name replaced in one upstream module or class."""

    owner: str
    """``package.module``, or ``package.module:Class`` for a name in a class."""
    name: str
    """The attribute to replace. If upstream lacks it (a guarded import failed), it is added."""
    make: Callable[[Any], Any]
    """Called with the upstream object, or None if there is none; returns the replacement."""
    reason: str
    """What fails without the patch."""

    @property
    def target(self) -> str:
        return f"{self.owner}.{self.name}"


def apply(patches: Iterable[Patch]) -> tuple[str, ...]:
    """Applies each patch once per process, in order.

    Returns:
        The names that this call replaced; empty if all were already replaced.

    Raises:
        ImportError: an owner is not installed.
    """
    done = []
    for patch in patches:
        if patch.target in _applied:
            continue
        owner = _resolve(patch.owner)
        original = getattr(owner, patch.name, _MISSING)
        setattr(owner, patch.name, patch.make(None if original is _MISSING else original))
        _applied.add(patch.target)
        done.append(patch.target)
    return tuple(done)


def _resolve(owner: str) -> Any:
    module_name, _, class_name = owner.partition(":")
    module = importlib.import_module(module_name)
    return getattr(module, class_name) if class_name else module
