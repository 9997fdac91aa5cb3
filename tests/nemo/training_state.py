# SPDX-License-Identifier: Apache-2.0
"""All that a training step changes, as bits."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

__all__ = ["bits_of", "everything", "flip_a_bit"]


def everything(trainer: Any, module: Any) -> list[Any]:
    """Parameters, moments, step counts and learning rate, as bytes and numbers."""
    optimizer = trainer.optimizers[0]
    inner = getattr(optimizer, "mcore_optimizer", getattr(optimizer, "optimizer", optimizer))
    inner = getattr(inner, "chained_optimizers", [inner])
    states = [value for each in inner for _, values in _states(each) for value in values]
    lr = [group["lr"] for group in optimizer.param_groups]
    return [bits_of(p) for p in module.tied_lora.parameters()] + states + lr


def _states(optimizer: Any) -> Iterator[tuple[int, list[Any]]]:
    optimizer = getattr(optimizer, "optimizer", optimizer)
    groups = [] if optimizer is None else optimizer.param_groups
    for index, parameter in enumerate(p for group in groups for p in group["params"]):
        state = optimizer.state.get(parameter, {})
        yield index, [bits_of(v) if isinstance(v, torch.Tensor) else v for _, v in sorted(state.items())]


def bits_of(tensor: torch.Tensor) -> bytes:
    return tensor.detach().clone().reshape(-1).view(torch.uint8).numpy().tobytes()


def flip_a_bit(adapter: Any, name: str) -> None:
    """Changes one bit of this rank's copy of a factor."""
    for chunk in adapter.chunks:
        parameter = dict(chunk.factors.named_parameters()).get(name)
        if parameter is not None:
            parameter.data.view(torch.uint8).view(-1)[0] ^= 1
