# SPDX-License-Identifier: Apache-2.0
"""Selects the device on which a rank computes and from which it sends: its GPU if there is one, else the CPU."""

from __future__ import annotations

import os

import torch

from nemo_tied_lora.platform import detect

__all__ = ["collective_device", "select_device"]


def select_device(accelerator: str | None = None) -> torch.device:
    """Makes this rank's GPU (by LOCAL_RANK) the current one and returns it; returns the CPU if there is no GPU.

    Args:
        accelerator: Lightning's `trainer.accelerator`. With "cpu", no GPU is used.
    """
    if accelerator == "cpu" or not detect.has_gpu():
        return torch.device("cpu")
    torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    return torch.device("cuda", torch.cuda.current_device())


def collective_device() -> torch.device:
    """The device for tensors of collectives in the default process group: NCCL sends from a GPU, gloo from the CPU."""
    if torch.distributed.get_backend() == "nccl":
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device("cpu")
