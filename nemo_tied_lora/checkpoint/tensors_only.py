# SPDX-License-Identifier: Apache-2.0
"""Reads files of `torch.save` as tensors and plain values only: no code in the file can run."""

from __future__ import annotations

import io
import os
from typing import IO, Any

import torch

from nemo_tied_lora.errors import ConfigError

__all__ = ["load_tensors"]


def load_tensors(file: str | os.PathLike | IO[bytes], what: str) -> Any:
    """Returns the object in the file, with its tensors on the CPU. Accepts Transformer Engine's extra states.

    Args:
        what: the user's name for the file, for messages.

    Raises:
        ConfigError: the file holds more than tensors and plain values, or is damaged. OSError: it cannot be read.
    """
    try:
        # Transformer Engine's extra states are bytes.
        with torch.serialization.safe_globals([io.BytesIO, bytes]):
            return torch.load(file, map_location="cpu", weights_only=True)
    except (OSError, MemoryError):
        raise
    except Exception as error:  # whatever a damaged or hostile pickle raises
        # Leave out torch's advice, which is to allow what the file asks for.
        detail = str(error).rpartition("WeightsUnpickler error: ")[2].partition(" Please use")[0]
        reason = " ".join(detail.split())[:300] or type(error).__name__
        raise ConfigError([f"{what}: cannot be read as tensors alone, and is not run: {reason}"]) from error
