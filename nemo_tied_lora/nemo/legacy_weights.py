# SPDX-License-Identifier: Apache-2.0
"""Legacy checkpoints, a base's or a stock adapter's `model_weights.ckpt`, unpickled without pickle's power to run code."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from nemo.core.connectors.save_restore_connector import SaveRestoreConnector

from nemo_tied_lora.checkpoint.tensors_only import load_tensors
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
        return load_tensors(model_weights, model_weights)
    except ConfigError as error:
        if os.environ.get("WORLD_SIZE", "1") != "1":
            raise RuntimeError(str(error)) from error
        raise
