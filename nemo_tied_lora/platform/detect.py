# SPDX-License-Identifier: Apache-2.0
"""What this machine has: the questions that decide which switch is thrown, and nothing else."""

from __future__ import annotations

import importlib
import os

__all__ = ["has_apex", "has_gpu", "has_transformer_engine", "in_nvidia_container"]


def has_gpu() -> bool:
    """True where torch can use a CUDA device."""
    import torch

    return torch.cuda.is_available()


def has_apex() -> bool:
    """True where NVIDIA's apex imports. An unrelated project called apex exists: only NVIDIA's has this module."""
    return _imports("apex.multi_tensor_apply")


def has_transformer_engine() -> bool:
    """True where Transformer Engine imports; it does not without the CUDA libraries, even when it is installed."""
    return _imports("transformer_engine.pytorch")


def in_nvidia_container() -> bool:
    """True in NVIDIA's PyTorch and NeMo containers, which say so in the environment."""
    return "NVIDIA_PYTORCH_VERSION" in os.environ


def _imports(module: str) -> bool:
    """Whether ``module`` imports: a broken installation raises more than ImportError, and counts as absent."""
    try:
        importlib.import_module(module)
    except Exception:
        return False
    return True
