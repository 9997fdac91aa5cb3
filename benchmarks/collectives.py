# SPDX-License-Identifier: Apache-2.0
"""Counts the collectives of this rank, in forward and backward, with their bytes.

The counter intercepts torch's `c10d` operators, below `torch.distributed`. So it also counts a library that keeps its own
reference to `all_gather_into_tensor`, as megatron-core does.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

__all__ = ["Call", "CollectiveCounter", "added", "uncounted"]


@dataclass(frozen=True)
class Call:
    """One kind of collective. shape: the whole message, gathered or before scattering. ranks: the size of the group."""

    phase: str
    operation: str
    group: str
    ranks: int
    shape: tuple[int, ...]
    num_bytes: int

    @property
    def sent(self) -> Fraction:
        """Bytes that each rank sends in one call, by a ring; in a send, only the sender's."""
        share = _SHARES[_OPERATIONS[self.operation][0]]
        return share(self.ranks) * self.num_bytes


class CollectiveCounter(TorchDispatchMode):
    """`with counter:` counts every collective of this thread and of the backward passes that it starts.

    Args:
        groups: name to process group. A collective of any other group counts under "other".

    Raises:
        NotImplementedError: the counter does not know the bytes of a collective.
    """

    def __init__(self, groups: dict[str, Any]):
        super().__init__()
        self.calls: Counter[Call] = Counter()
        self._names = {group.group_name: name for name, group in groups.items()}
        self._phase = ""

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Counts under this name inside the context."""
        before, self._phase = self._phase, name
        try:
            with self:
                yield
        finally:
            self._phase = before

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "c10d" and not _paused:
            self._count(func.name().removeprefix("c10d::"), args)
        return func(*args, **(kwargs or {}))

    def _count(self, operation: str, args: tuple[Any, ...]) -> None:
        if operation not in _OPERATIONS:
            raise NotImplementedError(f"{operation}: its bytes are not known; add it to benchmarks/collectives.py")
        kind, position = _OPERATIONS[operation]
        if kind == "nothing":
            return
        group = next(unboxed for unboxed in map(_process_group, args) if unboxed is not None)
        tensors = list(_tensors(args[position]))
        shape = tuple(tensors[0].shape) if len(tensors) == 1 else (len(tensors), *tensors[0].shape)
        num_bytes = sum(tensor.numel() * tensor.element_size() for tensor in tensors)
        name = self._names.get(group.group_name, "other")
        self.calls[Call(self._phase, operation, name, group.size(), shape, num_bytes)] += 1


@contextmanager
def uncounted() -> Iterator[None]:
    """Switches all counters off inside the context."""
    _paused.append(True)
    try:
        yield
    finally:
        _paused.pop()


def added(calls: Counter[Call], base: Counter[Call]) -> Counter[Call]:
    """`calls` minus `base`.

    Raises:
        ValueError: `calls` lacks a collective of the base, so the two cannot be compared.
    """
    missing = base - calls
    if missing:
        raise ValueError(f"the base's own collectives changed: {dict(missing)} are gone")
    return calls - base


_paused: list[bool] = []

# Operator to its kind of cost and the position of the argument that holds the whole message.
_OPERATIONS = {
    "allreduce_": ("all_reduce", 0),
    "allgather_": ("all_gather", 0),
    "_allgather_base_": ("all_gather", 0),
    "reduce_scatter_": ("reduce_scatter", 1),
    "_reduce_scatter_base_": ("reduce_scatter", 1),
    "alltoall_base_": ("all_to_all", 1),
    "broadcast_": ("broadcast", 0),
    "send": ("send", 0),
    "recv_": ("nothing", 0),
    "barrier": ("nothing", 0),
}
_SHARES = {
    "all_reduce": lambda n: Fraction(2 * (n - 1), n),
    "all_gather": lambda n: Fraction(n - 1, n),
    "reduce_scatter": lambda n: Fraction(n - 1, n),
    "all_to_all": lambda n: Fraction(n - 1, n),
    "broadcast": lambda n: Fraction(n - 1, n),
    "send": lambda n: Fraction(1),
}


def _process_group(argument: Any) -> Any:
    if not isinstance(argument, torch.ScriptObject):
        return None
    try:
        return torch.distributed.ProcessGroup.unbox(argument)
    except RuntimeError:  # a ReduceOp is a ScriptObject too
        return None


def _tensors(argument: Any) -> Iterator[torch.Tensor]:
    if isinstance(argument, torch.Tensor):
        yield argument
    else:
        for part in argument:
            yield from _tensors(part)
