# SPDX-License-Identifier: Apache-2.0
"""Tied-LoRA for NVIDIA NeMo and Megatron (arXiv 2311.09578)."""

from typing import TYPE_CHECKING, Any

from nemo_tied_lora.config import TiedLoraConfig
from nemo_tied_lora.errors import ConfigError

if TYPE_CHECKING:
    from nemo_tied_lora.adapter.inject import inject
    from nemo_tied_lora.adapter.injected_adapter import Adapter
    from nemo_tied_lora.adapter.quantized.quantize_base import QuantizedBase, base_precision, quantize_base
    from nemo_tied_lora.checkpoint.save_load_on_any_layout import load_adapter, save_adapter
    from nemo_tied_lora.multi_adapter import Adapters
    from nemo_tied_lora.planning.settings.training_loop_checks import check_ddp

__all__ = [
    "Adapter",
    "Adapters",
    "ConfigError",
    "QuantizedBase",
    "TiedLoraConfig",
    "base_precision",
    "check_ddp",
    "inject",
    "load_adapter",
    "quantize_base",
    "save_adapter",
]

_LAZY = {
    "Adapter": "nemo_tied_lora.adapter.injected_adapter",
    "Adapters": "nemo_tied_lora.multi_adapter",
    "QuantizedBase": "nemo_tied_lora.adapter.quantized.quantize_base",
    "base_precision": "nemo_tied_lora.adapter.quantized.quantize_base",
    "check_ddp": "nemo_tied_lora.planning.settings.training_loop_checks",
    "inject": "nemo_tied_lora.adapter.inject",
    "load_adapter": "nemo_tied_lora.checkpoint.save_load_on_any_layout",
    "quantize_base": "nemo_tied_lora.adapter.quantized.quantize_base",
    "save_adapter": "nemo_tied_lora.checkpoint.save_load_on_any_layout",
}


def __getattr__(name: str) -> Any:
    """Imports torch and Megatron on first use of a name that needs them, so `tied-lora plan` does not import them."""
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module(_LAZY[name]), name)
