# SPDX-License-Identifier: Apache-2.0
"""Adapters with the same frozen factors hold them in the same memory."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch
from torch import nn

__all__ = ["frozen_parameters", "own_frozen", "share_frozen"]


def share_frozen(factors: nn.Module, others: Iterable[nn.Module]) -> None:
    """Replaces each frozen parameter by that of another adapter of the same name, dtype, device, shape and bits.

    Args:
        factors: one model chunk's factors; its parameters are exchanged, never changed.
        others: the other adapters' factors for the same chunk.
    """
    known = [{path: parameter for path, _, _, parameter in frozen_parameters(other)} for other in others]
    for path, holder, name, parameter in frozen_parameters(factors):
        candidates = {id(frozen[path]): frozen[path] for frozen in known if path in frozen}
        for candidate in candidates.values():
            if _same_bits(parameter, candidate):
                candidate.is_shared_by_adapters = True  # type: ignore[attr-defined]
                setattr(holder, name, candidate)
                break


def own_frozen(factors: nn.Module) -> None:
    """Gives the adapter copies of what it shares, so that values may be loaded into it without changing others."""
    for _, holder, name, parameter in list(frozen_parameters(factors)):
        if getattr(parameter, "is_shared_by_adapters", False):
            copy = nn.Parameter(parameter.detach().clone(), requires_grad=False)
            copy.__dict__.update(parameter.__dict__)
            copy.is_shared_by_adapters = False  # type: ignore[attr-defined]
            setattr(holder, name, copy)


def frozen_parameters(factors: nn.Module) -> Iterator[tuple[str, nn.Module, str, nn.Parameter]]:
    """(whole name, the module that holds it, its name there, parameter) of every frozen one."""
    for prefix, holder in factors.named_modules():
        for name, parameter in list(holder.named_parameters(recurse=False)):
            if not parameter.requires_grad:
                yield f"{prefix}.{name}", holder, name, parameter


def _same_bits(first: torch.Tensor, second: torch.Tensor) -> bool:
    alike = (first.shape, first.dtype, first.device) == (second.shape, second.dtype, second.device)
    return alike and torch.equal(_bits(first), _bits(second))


def _bits(tensor: torch.Tensor) -> torch.Tensor:
    """As bytes: 0.0 and -0.0 differ."""
    return tensor.detach().contiguous().view(torch.uint8)
