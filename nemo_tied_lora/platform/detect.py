# SPDX-License-Identifier: Apache-2.0
"""Detects what this machine has. The switches ask these functions."""

from __future__ import annotations

import importlib
import os

__all__ = ["has_apex", "has_gpu", "has_transformer_engine", "in_nvidia_container"]


def has_gpu() -> bool:
    """Returns whether torch can use a CUDA device."""
    import torch

    return torch.cuda.is_available()


def has_apex() -> bool:
    """Returns whether NVIDIA's apex can be imported. An unrelated project named apex lacks this module."""
    return _imports("apex.multi_tensor_apply")


def has_transformer_engine() -> bool:
    """Returns whether Transformer Engine can be imported. Without the CUDA libraries it cannot, even if installed."""
    return _imports("transformer_engine.pytorch")


def in_nvidia_container() -> bool:
    """Returns whether this is one of NVIDIA's PyTorch or NeMo containers, by the environment."""
    return "NVIDIA_PYTORCH_VERSION" in os.environ


def _imports(module: str) -> bool:
    """Returns whether a module can be imported. A broken installation raises other errors too, and counts as absent."""
    try:
        importlib.import_module(module)
    except Exception:
        return False
    return True
