# SPDX-License-Identifier: Apache-2.0
"""Counts the bytes of all tensors that a call holds at the same time.

The count is taken at each operator, so the allocator's caching does not matter.
"""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

__all__ = ["peak_of"]


def peak_of(call: Callable[[], Any]) -> int:
    """Bytes, at the peak, of the storages that the call created."""
    with _Live() as live:
        call()
    return live.peak


class _Live(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self._holders: Counter[int] = Counter()
        self._now = self.peak = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        results = func(*args, **(kwargs or {}))
        given = {self._address(tensor) for tensor in tree_leaves((args, kwargs)) if isinstance(tensor, torch.Tensor)}
        for tensor in tree_leaves(results):
            if isinstance(tensor, torch.Tensor):
                self._hold(tensor, given)
        return results

    def _hold(self, tensor: torch.Tensor, given: set[int]) -> None:
        address, size = self._address(tensor), tensor.untyped_storage().nbytes()
        if address in given and address not in self._holders:  # existed before the call
            return
        if not self._holders[address]:
            self._now += size
            self.peak = max(self.peak, self._now)
        self._holders[address] += 1
        weakref.finalize(tensor, self._drop, address, size)

    def _drop(self, address: int, size: int) -> None:
        self._holders[address] -= 1
        if not self._holders[address]:
            del self._holders[address]
            self._now -= size

    def _address(self, tensor: torch.Tensor) -> int:
        return tensor.untyped_storage().data_ptr()
