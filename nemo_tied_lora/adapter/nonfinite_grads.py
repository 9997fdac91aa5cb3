# SPDX-License-Identifier: Apache-2.0
"""Checks that every gradient of every rank is finite, and names the first one that is not."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from nemo_tied_lora.platform.devices import collective_device

__all__ = ["NonfiniteGradient", "find_nonfinite"]

_BLOCKS = ("linear_qkv", "linear_proj", "linear_fc1", "linear_fc2")


@dataclass(frozen=True)
class NonfiniteGradient:
    """The first trained tensor, in the order of the backward pass, whose gradient holds NaN or infinity."""

    name: str
    """Global, as "layers.7.linear_qkv.u"."""
    layer: int | None
    """None for a tied tensor."""
    ranks: tuple[int, ...]
    """The ranks where its gradient is not finite."""
    tensors: int
    """How many trained tensors have such a gradient on some rank."""

    def __str__(self) -> str:
        where = "shared by all layers" if self.layer is None else f"layer {self.layer}"
        ranks = ", ".join(str(rank) for rank in self.ranks[:8]) + (", ..." if len(self.ranks) > 8 else "")
        others = f", and of {self.tensors - 1} more tensor(s)" if self.tensors > 1 else ""
        noun = "ranks" if len(self.ranks) > 1 else "rank"
        return f"the gradient of {self.name} ({where}) holds NaN or infinity on {noun} {ranks}{others}"


def find_nonfinite(named: Iterable[tuple[str, nn.Parameter]]) -> NonfiniteGradient | None:
    """Finds a gradient that holds NaN or infinity on some rank. All ranks must call it.

    Reads `main_grad` if Megatron keeps gradients there, else `grad`. Call it after all sums of gradients and before
    clipping. If all gradients are finite, it sends only one 1-byte all-reduce over all ranks; otherwise it also gathers
    the names.

    Args:
        named: this rank's trained parameters under their global names.

    Returns:
        None if every gradient of every rank is finite, else the same result on every rank.
    """
    gradients = ((name, _gradient(parameter)) for name, parameter in named)
    found = [(name, gradient) for name, gradient in gradients if gradient is not None]
    finite = _finite([gradient for _, gradient in found])
    flag = torch.zeros((), dtype=torch.uint8, device=found[0][1].device if found else collective_device())
    if finite is not None:
        flag |= ~finite.all()
    torch.distributed.all_reduce(flag, op=torch.distributed.ReduceOp.MAX)
    if not flag.item():
        return None
    each = [] if finite is None else finite.tolist()
    return _first(dict.fromkeys(name for (name, _), good in zip(found, each, strict=True) if not good))


def _first(own: Iterable[str]) -> NonfiniteGradient:
    everyone: list[list[str]] = [[]] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(everyone, list(own))
    name = min({name for names in everyone for name in names}, key=_backward_order)
    ranks = tuple(rank for rank, names in enumerate(everyone) if name in names)
    return NonfiniteGradient(name, _layer(name), ranks, len({name for names in everyone for name in names}))


def _backward_order(name: str) -> tuple[int, int, str]:
    """Sort key: the order in which the backward pass reaches the tensors, the last layer's MLP first.

    NaN spreads backwards, so the first tensor that has one is closest to the cause. A tied tensor sums over all layers,
    so it tells least and comes last.
    """
    layer = _layer(name)
    block = next((-index for index, block in enumerate(_BLOCKS) if block in name), 1)
    return (1 if layer is None else -layer, block, name)


def _layer(name: str) -> int | None:
    match = re.search(r"\blayers\.(\d+)\.", name)
    return None if match is None else int(match.group(1))


def _gradient(parameter: nn.Parameter) -> torch.Tensor | None:
    gradient = getattr(parameter, "main_grad", None)
    return parameter.grad if gradient is None else gradient


def _finite(gradients: Sequence[torch.Tensor]) -> torch.Tensor | None:
    """(n,) whether each gradient is finite. Uses the largest absolute value, because a sum could overflow."""
    if not gradients:
        return None
    largest = torch._foreach_norm(list(gradients), float("inf"))
    one_dtype = len({value.dtype for value in largest}) == 1
    return torch.stack(largest if one_dtype else [value.double() for value in largest]).isfinite()
