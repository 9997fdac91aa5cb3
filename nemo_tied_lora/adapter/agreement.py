# SPDX-License-Identifier: Apache-2.0
"""Lets ranks fail together: what fails on one rank is raised on all, so that no rank waits for one that has stopped."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch

from nemo_tied_lora.errors import ConfigError
from nemo_tied_lora.platform.devices import collective_device

__all__ = ["exchange", "from_rank_0", "raise_together"]

_Value = TypeVar("_Value")


def exchange(value: Any) -> list[Any]:
    """Returns every rank's value, in rank order. All ranks of the job must call it."""
    if _alone():
        return [value]
    values: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(values, value)
    return values


def from_rank_0(call: str, compute: Callable[[], _Value]) -> _Value:
    """Calls `compute` on rank 0 alone, and returns its value on every rank. All ranks of the job must call it.

    Args:
        call: as in `raise_together`.

    Raises:
        Exception: as in `raise_together`, if `compute` fails.
    """
    value, failure = None, None
    if _alone() or torch.distributed.get_rank() == 0:
        try:
            value = compute()
        except Exception as error:
            failure = error
    raise_together(call, failure)
    result: _Value = exchange(value)[0]
    return result


def raise_together(call: str, failure: Exception | None) -> None:
    """Raises on every rank if a rank has a failure. All ranks of the job must call it.

    It sends one number if no rank has a failure.

    Args:
        call: the name of the call that failed, for messages.
        failure: this rank's; None if it has none.

    Raises:
        Exception: this rank's own failure.
        ConfigError: this rank has none, and the first failure of the others is a `ConfigError`.
        RuntimeError: this rank has none. Names the first rank that has one, and its message.
    """
    if not _alone():
        flag = torch.tensor(int(failure is not None), device=collective_device())
        torch.distributed.all_reduce(flag, op=torch.distributed.ReduceOp.MAX)
        if not flag.item():
            return
    found = exchange(None if failure is None else _described(failure))
    if failure is not None:
        raise failure
    for rank, described in enumerate(found):
        if described is not None:
            problems, text = described
            if problems:
                raise ConfigError(problems)
            raise RuntimeError(f"{call}: rank {rank} failed, so nothing was changed on any rank: {text}")


def _described(failure: Exception) -> tuple[tuple[str, ...], str]:
    """The problems of a `ConfigError`, and a line with type and message."""
    problems = failure.problems if isinstance(failure, ConfigError) else ()
    return problems, f"{type(failure).__name__}: {failure}"


def _alone() -> bool:
    return not torch.distributed.is_initialized() or torch.distributed.get_world_size() == 1
