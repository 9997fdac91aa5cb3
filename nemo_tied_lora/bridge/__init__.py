# SPDX-License-Identifier: Apache-2.0
"""Tied-LoRA for Megatron-Bridge: the same configuration, the same numbers and the same adapter file as elsewhere."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from nemo_tied_lora.bridge.plugin import FactorRates, TiedLoRA, check_run

__all__ = ["FactorRates", "TiedLoRA", "check_run"]


def __getattr__(name: str) -> Any:
    """Imports Bridge on first use."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from nemo_tied_lora.bridge import plugin

    return getattr(plugin, name)
