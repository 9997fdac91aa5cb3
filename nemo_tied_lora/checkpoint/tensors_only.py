# SPDX-License-Identifier: Apache-2.0
"""What `torch.save` wrote, read as tensors and plain values alone: nothing in the file can run."""

from __future__ import annotations

import io
import os
from typing import IO, Any

import torch

from nemo_tied_lora.errors import ConfigError

__all__ = ["load_tensors"]


def load_tensors(file: str | os.PathLike | IO[bytes], what: str) -> Any:
    """The object in the file, its tensors on the CPU. Transformer Engine's extra states may be in it.

    Args:
        what: what the user calls the file, for messages.

    Raises:
        ConfigError: it holds more than tensors and plain values, or is damaged. OSError: it cannot be read.
    """
    try:
        # Transformer Engine's extra states are bytes.
        with torch.serialization.safe_globals([io.BytesIO, bytes]):
            return torch.load(file, map_location="cpu", weights_only=True)
    except (OSError, MemoryError):
        raise
    except Exception as error:  # whatever a damaged or hostile pickle raises
        # Without torch's advice, which is to allow what the file asks for.
        said = str(error).rpartition("WeightsUnpickler error: ")[2].partition(" Please use")[0]
        reason = " ".join(said.split())[:300] or type(error).__name__
        raise ConfigError([f"{what}: cannot be read as tensors alone, and is not run: {reason}"]) from error
