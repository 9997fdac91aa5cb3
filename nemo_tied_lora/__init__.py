# SPDX-License-Identifier: Apache-2.0
"""Tied-LoRA for NVIDIA NeMo and Megatron (arXiv 2311.09578)."""

from typing import TYPE_CHECKING, Any

from nemo_tied_lora.config import ConfigError, TiedLoraConfig

if TYPE_CHECKING:
    from nemo_tied_lora.adapter import Adapter
    from nemo_tied_lora.export.nemo_adapter import load_adapter, save_adapter
    from nemo_tied_lora.injection import inject
    from nemo_tied_lora.loops import check_ddp
    from nemo_tied_lora.several import Adapters

__all__ = [
    "Adapter",
    "Adapters",
    "ConfigError",
    "TiedLoraConfig",
    "check_ddp",
    "inject",
    "load_adapter",
    "save_adapter",
]

_LAZY = {
    "Adapter": "nemo_tied_lora.adapter",
    "Adapters": "nemo_tied_lora.several",
    "check_ddp": "nemo_tied_lora.loops",
    "inject": "nemo_tied_lora.injection",
    "load_adapter": "nemo_tied_lora.export.nemo_adapter",
    "save_adapter": "nemo_tied_lora.export.nemo_adapter",
}


def __getattr__(name: str) -> Any:
    """Imports torch and Megatron only when something that needs them is used: `tied-lora plan` does not."""
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module(_LAZY[name]), name)
