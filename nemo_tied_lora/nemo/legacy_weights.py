# SPDX-License-Identifier: Apache-2.0
"""Legacy checkpoints, a base's or a stock adapter's `model_weights.ckpt`, unpickled without pickle's power to run code."""

from __future__ import annotations

import io
import pickle
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from nemo.core.connectors.save_restore_connector import SaveRestoreConnector

from nemo_tied_lora.config import ConfigError

__all__ = ["tensors_only"]


@contextmanager
def tensors_only() -> Iterator[None]:
    """Within it NeMo reads legacy weights with `weights_only=True`; NeMo 2.4 itself asks torch for the opposite."""
    theirs = SaveRestoreConnector._load_state_dict_from_disk
    SaveRestoreConnector._load_state_dict_from_disk = staticmethod(_load)
    try:
        yield
    finally:
        SaveRestoreConnector._load_state_dict_from_disk = staticmethod(theirs)


def _load(model_weights: str, map_location: Any = None) -> Any:
    """The state dict, on the CPU as NeMo has it.

    Raises:
        ConfigError: it holds more than tensors and plain values, or is damaged.
    """
    try:
        # Transformer Engine's extra states are bytes, also none.
        with torch.serialization.safe_globals([io.BytesIO, bytes]):
            return torch.load(model_weights, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError) as error:
        reason = " ".join(str(error).rpartition("WeightsUnpickler error: ")[2].split())[:300]
        raise ConfigError([f"{model_weights}: cannot be read as tensors alone, and is not run: {reason}"]) from error
