# SPDX-License-Identifier: Apache-2.0
"""Makes NeMo read legacy weights (`model_weights.ckpt`) without running code from their pickle."""

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
    """Inside this context NeMo reads legacy weights with `weights_only=True`. NeMo 2.4 itself uses False."""
    theirs = SaveRestoreConnector._load_state_dict_from_disk
    SaveRestoreConnector._load_state_dict_from_disk = staticmethod(_load)
    try:
        yield
    finally:
        SaveRestoreConnector._load_state_dict_from_disk = staticmethod(theirs)


def _load(model_weights: str, map_location: Any = None) -> Any:
    """The state dict, on the CPU as in NeMo.

    Raises:
        ConfigError: the file holds more than tensors and plain values, or is damaged; only one rank runs.
        RuntimeError: the same, and several ranks run. Each rank reads its own file, so the others do not know of it.
    """
    try:
        return load_tensors(model_weights, model_weights)
    except ConfigError as error:
        if os.environ.get("WORLD_SIZE", "1") != "1":
            raise RuntimeError(str(error)) from error
        raise
