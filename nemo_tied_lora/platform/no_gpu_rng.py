# SPDX-License-Identifier: Apache-2.0
"""Megatron's random state on the CPU: its tracker's "GPU generator" is torch's default CPU generator.

The named states keep their meaning: ``model-parallel-rng`` differs between tensor-parallel ranks, and the
default state is the same on them.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

__all__ = ["fork", "get_state", "seed_cpu", "set_state"]


def get_state(*_args: Any, **_kwargs: Any) -> torch.Tensor:
    """The default generator's state. The arguments (device, clone, graph_safe) concern a GPU."""
    return torch.get_rng_state()


def set_state(new_state: torch.Tensor, *_args: Any, **_kwargs: Any) -> None:
    """Set the default generator's state."""
    torch.set_rng_state(new_state)


def seed_cpu(seed: int) -> None:
    """Seed the default generator alone, as ``torch.cuda.manual_seed`` does for one GPU."""
    torch.default_generator.manual_seed(seed)


@contextmanager
def fork(tracker: Any, name: str = "model-parallel-rng") -> Iterator[None]:
    """Draw from the tracker's state ``name`` inside the context, and go on from the present state after it.

    Raises:
        KeyError: no state of that name was seeded.
    """
    if name not in tracker.states_:
        raise KeyError(f"the random state {name!r} was never seeded: call model_parallel_cuda_manual_seed(seed) first")
    outside = torch.get_rng_state()
    torch.set_rng_state(tracker.states_[name])
    try:
        yield
    finally:
        tracker.states_[name] = torch.get_rng_state()
        torch.set_rng_state(outside)
