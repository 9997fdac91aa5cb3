# SPDX-License-Identifier: Apache-2.0
"""Which device a rank computes on and sends from: its GPU where there is one, else the CPU."""

from __future__ import annotations

import os

import torch

from nemo_tied_lora.platform import detect

__all__ = ["collective_device", "select_device"]


def select_device(accelerator: str | None = None) -> torch.device:
    """Makes this rank's GPU the current one (by LOCAL_RANK) and returns it; the CPU where there is none.

    Args:
        accelerator: Lightning's `trainer.accelerator`; "cpu" leaves a GPU alone.
    """
    if accelerator == "cpu" or not detect.has_gpu():
        return torch.device("cpu")
    torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    return torch.device("cuda", torch.cuda.current_device())


def collective_device() -> torch.device:
    """Where tensors of the default process group's collectives must be: NCCL sends from a GPU, gloo from the CPU."""
    if torch.distributed.get_backend() == "nccl":
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device("cpu")
