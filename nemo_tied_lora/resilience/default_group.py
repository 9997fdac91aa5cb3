# SPDX-License-Identifier: Apache-2.0
"""Makes the default process group before Lightning does; Lightning then uses it."""

from __future__ import annotations

import datetime
import os
from collections.abc import Mapping
from typing import Any

import torch
from torch.distributed import HashStore, PrefixStore

from nemo_tied_lora.platform.devices import select_device
from nemo_tied_lora.resilience.rendezvous import Rendezvous

__all__ = ["make_default_group"]


def make_default_group(values: Mapping[str, Any], rendezvous: Rendezvous | None, seconds: float | None) -> None:
    """Makes the group over the ranks' store, unless there is a default group.

    Lightning would listen at MASTER_PORT, where rank 0 already has the ranks' store unless torchrun holds one. A rank that
    is alone needs no port, so several runs on one machine cannot meet.

    Args:
        values: the composed configuration.
        rendezvous: None: this rank is alone.
        seconds: time limit of a collective. None or 0: torch's own.
    """
    if torch.distributed.is_initialized():
        return
    device = select_device(values["trainer"].get("accelerator"))
    torch.distributed.init_process_group(
        "nccl" if device.type == "cuda" else "gloo",
        store=HashStore() if rendezvous is None else PrefixStore("process_group", rendezvous.store),
        rank=int(os.environ["RANK"]),
        world_size=int(os.environ["WORLD_SIZE"]),
        timeout=datetime.timedelta(seconds=seconds) if seconds else None,
    )
