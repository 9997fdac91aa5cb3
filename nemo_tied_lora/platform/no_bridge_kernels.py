# SPDX-License-Identifier: Apache-2.0
"""The switch for Megatron-Bridge on a machine without Transformer Engine.

All of Bridge imports ``megatron.bridge.peft.lora_layers``, which imports Transformer Engine unconditionally. That one module
gets a stand-in. Every other module finds no Transformer Engine, and takes what it has for that case. Checked with
megatron-bridge 0.6.2.
"""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import ModuleType
from typing import Any

import torch

from nemo_tied_lora.platform import detect

__all__ = ["OWNER", "enable"]

OWNER = "megatron.bridge.peft.lora_layers"
"""The module that gets the stand-in."""
_PACKAGES = ("transformer_engine", "transformer_engine.pytorch")


def enable() -> tuple[str, ...]:
    """Makes Bridge importable without Transformer Engine. Imports nothing itself.

    Returns:
        The name that sees a stand-in; empty if Transformer Engine is installed, or an earlier call has done it.
    """
    if detect.has_transformer_engine() or any(isinstance(finder, _Finder) for finder in sys.meta_path):
        return ()
    sys.meta_path.insert(0, _Finder())
    return (f"{OWNER}.te",)


class _Finder(importlib.abc.MetaPathFinder):
    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if name != OWNER:
            return None
        spec = importlib.machinery.PathFinder.find_spec(name, path)
        if spec is not None and spec.origin is not None:
            spec.loader = _Loader(name, spec.origin)
        return spec


class _Loader(importlib.machinery.SourceFileLoader):
    def exec_module(self, module: ModuleType) -> None:
        with _stand_in():
            super().exec_module(module)


@contextmanager
def _stand_in() -> Iterator[None]:
    """In this context ``import transformer_engine.pytorch`` gives a module whose names are classes of no instance."""
    modules = {name: _Nothing(name) for name in _PACKAGES}
    modules[_PACKAGES[0]].pytorch = modules[_PACKAGES[1]]  # type: ignore[attr-defined]
    sys.modules.update(modules)
    try:
        yield
    finally:
        for name in _PACKAGES:
            sys.modules.pop(name, None)


class _Nothing(ModuleType):
    """A package without content: any name in it is a class, or for a lower-case name such a package again."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        value: Any = _Nothing(f"{self.__name__}.{name}") if name.islower() else type(name, (torch.nn.Module,), {})
        setattr(self, name, value)
        return value
