# SPDX-License-Identifier: Apache-2.0
"""Legacy checkpoints, a base's or a stock adapter's `model_weights.ckpt`, unpickled without pickle's power to run code."""

from __future__ import annotations

import io
import os
import pickle
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from nemo.core.connectors.save_restore_connector import SaveRestoreConnector

from nemo_tied_lora.errors import ConfigError

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
        RuntimeError: so it does on one of several ranks, which read files of their own: the others are to be told.
    """
    try:
        # Transformer Engine's extra states are bytes, also none.
        with torch.serialization.safe_globals([io.BytesIO, bytes]):
            return torch.load(model_weights, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError) as error:
        reason = " ".join(str(error).rpartition("WeightsUnpickler error: ")[2].split())[:300]
        problem = f"{model_weights}: cannot be read as tensors alone, and is not run: {reason}"
        if os.environ.get("WORLD_SIZE", "1") != "1":
            raise RuntimeError(problem) from error
        raise ConfigError([problem]) from error
